"""Where what is made of pictures is written: files named after them, none lost by another."""

import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from captum_fusion._app.atomic_files import check_writable, write_whole
from captum_fusion._app.sample import NAME


class OutputFiles(NamedTuple):
    """A picture, and the files that are written for it."""

    image: Path | None
    picture: Path
    maps: Path | None


def plan_outputs(
    images: Sequence[Path], output: Path, save_npz: Path | None, inputs: Mapping[str, Path], *, force: bool
) -> list[OutputFiles]:
    """The places of all pictures, each once, or of the sample where there are none.

    Args:
        images (Sequence[Path]): The pictures.
        output (Path): The file to draw to, or a folder for files named after the pictures.
        save_npz (Path or None): The file for the maps, or a folder, likewise.
        inputs (Mapping[str, Path]): What else is read, by what it is.
        force (bool): Whether to overwrite files.

    Raises:
        ValueError: If a file cannot be written, would overwrite what is read or, without ``force``, any other file.
    """
    each: dict[Path, Path] = {}
    for image in images:
        each.setdefault(image.absolute(), image)
    once = list(each.values())
    explained: list[Path | None] = [*once] or [None]
    options = {"--output": (output, ".png"), "--save-npz": (save_npz, ".npz")}
    written = {
        option: _files(option, place, once or [Path(NAME)], suffix)
        for option, (place, suffix) in options.items()
        if place is not None
    }
    read = {_identity(image): "the picture" for image in once if image.exists()}
    read |= {_identity(file): name for name, file in inputs.items() if file.exists()}
    taken: dict[Path, str] = {}
    there = []
    for option, files in written.items():
        for file in files:
            if file.resolve() in taken:
                raise ValueError(f"{taken[file.resolve()]} and {option} {file} are one file; expected two")
            taken[file.resolve()] = f"{option} {file}"
            if file.is_file():
                if _identity(file) in read:
                    raise ValueError(f"{option} {file} would overwrite {read[_identity(file)]}; expected another file")
                there.append(file)
    if there and not force:
        more = f", and so do {len(there) - 1} more files" if len(there) > 1 else ""
        raise ValueError(f"{there[0]} exists{more}; expected another place, or --force to overwrite")
    pictures = written["--output"]
    nowhere: list[Path | None] = [None] * len(pictures)
    maps = written.get("--save-npz", nowhere)
    return [OutputFiles(*each) for each in zip(explained, pictures, maps, strict=True)]


def write_at(file: Path, content: bytes) -> None:
    """Writes a file, and makes its folder if that is not there yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content)


def _files(option: str, place: Path, images: Sequence[Path], suffix: str) -> list[Path]:
    """The file for each picture: the place itself, or where that is or shall be a folder, one of the picture's name."""
    if place.is_dir() or not (place.suffix or place.exists()):
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        if not existing.is_dir():
            raise ValueError(f"{option} is {place}, but {existing} is no folder")
        if not os.access(existing, os.W_OK):
            raise ValueError(f"{place} cannot be written: permission denied")
        files = [place / f"{name}{suffix}" for name in _names(images)]
    elif len(images) > 1:
        raise ValueError(f"{option} is {place} for {len(images)} pictures; expected a folder")
    else:
        files = [place]
    for file in files:
        if file.parent.exists() or file == place:
            check_writable(file)
    return files


def _names(images: Sequence[Path]) -> list[str]:
    """The pictures' names without their endings, numbered where they would be the same on some file system."""
    names: list[str] = []
    taken: set[str] = set()
    for image in images:
        numbered = (image.stem if number == 1 else f"{image.stem}-{number}" for number in count(1))
        name = next(name for name in numbered if name.casefold() not in taken)
        taken.add(name.casefold())
        names.append(name)
    return names


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino
