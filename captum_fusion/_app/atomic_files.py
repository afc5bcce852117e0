"""Files that are written whole or not at all, and whether they can be written."""

import os
import re
from pathlib import Path

_DRAFT = re.compile(r"\..+\.\d+\.draft")


def check_writable(file: Path) -> None:
    """Refuses a file that cannot be written, before anything is computed for it."""
    if not file.parent.is_dir():
        raise ValueError(f"The folder {file.parent} of {file} does not exist")
    if file.is_dir():
        raise ValueError(f"{file} is a folder; expected the name of a file to write")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: permission denied")


def stale_temp_files(folder: Path) -> list[Path]:
    """What is left of files whose writer was killed."""
    return [file for file in folder.glob(".*.*") if _DRAFT.fullmatch(file.name)]


def write_whole(file: Path, content: bytes | str) -> None:
    """Writes a file so that there is never half of it: beside it first, then renamed into place."""
    data = content.encode() if isinstance(content, str) else content
    if file.exists() and not file.is_file():
        # A pipe or a device, which cannot be replaced.
        file.write_bytes(data)
        return
    place = file.resolve()
    # What is added to a name may be too long for the file system.
    draft = place.with_name(f".{place.name[:50]}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(place)
    finally:
        draft.unlink(missing_ok=True)
