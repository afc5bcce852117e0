"""Records that survive whatever happens to the process: one line of JSON each, appended and flushed."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[str, str, str, str]

_SETTINGS = "settings.json"
_SHARDS = "records-*.jsonl"


def key_of(record: Mapping[str, Any]) -> Key:
    """What a record is of: model, picture, requested target and method."""
    return record["model"], record["image"], str(record["requested"]), record["method"]


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keeps the settings of a new folder, and refuses others than those of a folder that has some.

    Raises:
        ValueError: If the folder's records were made with other settings, naming the difference.
    """
    file = folder / _SETTINGS
    given = json.loads(json.dumps(settings))
    if not file.exists():
        # Renamed into place, so that there is never half of it.
        draft = folder / f".{_SETTINGS}.{os.getpid()}"
        draft.write_text(json.dumps(given, indent=2) + "\n")
        draft.replace(file)
        return
    kept = json.loads(file.read_text())
    for name in [*kept, *(name for name in given if name not in kept)]:
        if kept.get(name) != given.get(name):
            raise ValueError(
                f"{folder} holds records made with {name} = {kept.get(name)!r}, not {given.get(name)!r}; expected the "
                "same settings, or another output folder"
            )


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder.

    Raises:
        ValueError: If the folder has none.
    """
    file = folder / _SETTINGS
    if not file.exists():
        raise ValueError(f"{folder} holds no benchmark: there is no {_SETTINGS}")
    settings: dict[str, Any] = json.loads(file.read_text())
    return settings


def read_records(folder: Path) -> dict[Key, Record]:
    """All finished records of all processes; a half-written last line is not one."""
    records: dict[Key, Record] = {}
    for shard in sorted(folder.glob(_SHARDS)):
        for line in shard.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                record = json.loads(line)
                records.setdefault(key_of(record), record)
    return records


class Shard:
    """The file to which one process appends its records."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = folder / f"records-{rank:05d}.jsonl"
        content = self.file.read_bytes() if self.file.exists() else b""
        self.end = content.rfind(b"\n") + 1
        with self.file.open("ab") as stream:
            stream.truncate(self.end)

    def append(self, records: Iterable[Record]) -> None:
        """Appends records; when that fails, the file ends after its last whole record.

        Raises:
            OSError: If they cannot be written.
        """
        lines = b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
        try:
            with self.file.open("ab") as stream:
                stream.write(lines)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            with self.file.open("ab") as stream:
                stream.truncate(self.end)
            raise
        self.end += len(lines)
