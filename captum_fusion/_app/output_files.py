"""Output paths, one per image, without collisions, and what is written there, atomically."""

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from captum_fusion._app.explanation import Explanation, Prediction
from captum_fusion._app.images import SAMPLE_NAME

_TEMP_FILE = re.compile(r"\..+\.\d+\.draft")


class OutputFiles(NamedTuple):
    """An image, and the files that are written for it."""

    image: Path | None
    drawing: Path
    maps: Path | None


def plan_outputs(
    images: Sequence[Path],
    output: Path,
    save_npz: Path | None,
    save_predictions: Path | None,
    inputs: Mapping[str, Path],
    *,
    force: bool,
) -> list[OutputFiles]:
    """The output files of all images, each once, or of the sample where there are none.

    Args:
        images (Sequence[Path]): The images.
        output (Path): The file to draw to, or a folder for files named after the images.
        save_npz (Path or None): The file for the maps, or a folder for files named after the images.
        save_predictions (Path or None): The file for the predictions of all images.
        inputs (Mapping[str, Path]): The other files that are read, by their option.
        force (bool): Whether to overwrite files.

    Raises:
        ValueError: If a file cannot be written, would overwrite what is read or, without ``force``, any other file.
    """
    unique: dict[Path, Path] = {}
    for image in images:
        unique.setdefault(image.absolute(), image)
    once = list(unique.values())
    options = {"--output": (output, ".png"), "--save-npz": (save_npz, ".npz")}
    written = {
        option: _files(option, path, once or [Path(SAMPLE_NAME)], suffix)
        for option, (path, suffix) in options.items()
        if path is not None
    }
    if save_predictions is not None:
        if save_predictions.suffix.lower() not in (".csv", ".json"):
            raise ValueError(f"--save-predictions is {save_predictions}; expected a file ending in .csv or .json")
        written["--save-predictions"] = _files("--save-predictions", save_predictions, [Path()], "")
    read = {identity(image): "the image" for image in once if image.exists()}
    read |= {identity(file): name for name, file in inputs.items() if file.exists()}
    taken: dict[Path, str] = {}
    existing = []
    for option, files in written.items():
        for file in files:
            if file.resolve() in taken:
                raise ValueError(f"{taken[file.resolve()]} and {option} {file} are the same file; expected two")
            taken[file.resolve()] = f"{option} {file}"
            if file.is_file():
                if identity(file) in read:
                    raise ValueError(f"{option} {file} would overwrite {read[identity(file)]}; expected another file")
                existing.append(file)
    if existing and not force:
        more = f", as do {len(existing) - 1} more files" if len(existing) > 1 else ""
        raise ValueError(f"{existing[0]} already exists{more}; choose another --output or pass --force")
    explained: list[Path | None] = [*once] or [None]
    without: list[Path | None] = [None] * len(explained)
    rows = zip(explained, written["--output"], written.get("--save-npz", without), strict=True)
    return [OutputFiles(*row) for row in rows]


def archive(explanation: Explanation) -> bytes:
    """The maps and their metadata, as the content of a .npz file."""
    subject = ("image", "model", "weights", "precision", "layer", "target", "category")
    settings = ("percentile", "weighting", "tolerance", "probability")
    metadata = {
        **{name: getattr(explanation, name) for name in (*subject, *settings)},
        "masked_probabilities": explanation.masked_probabilities,
        "version": version("captum-fusion"),
    }
    arrays: dict[str, Any] = {name: values[0, 0].numpy() for name, values in explanation.maps.items()}
    content = io.BytesIO()
    np.savez_compressed(content, metadata=json.dumps(metadata), pixels=explanation.pixels[0].numpy(), **arrays)
    return content.getvalue()


def prediction_rows(prediction: Prediction, count: int) -> list[dict[str, Any]]:
    """The most probable classes of an image, a row each."""
    return [
        {"image": prediction.image, "rank": rank, "index": index, "category": category, "probability": probability}
        for rank, (index, category, probability) in enumerate(prediction.top(count), start=1)
    ]


def prediction_table(rows: Sequence[dict[str, Any]], suffix: str) -> str:
    """Rows of predictions as the content of a .csv or .json file."""
    if suffix.lower() == ".json":
        return json.dumps(rows, indent=1)
    content = io.StringIO()
    writer = csv.DictWriter(content, ("image", "rank", "index", "category", "probability"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def write_atomically(file: Path, content: bytes | str) -> None:
    """Writes a file atomically, beside it first and then renamed into place; makes its folder if there is none."""
    # A name that is not UTF-8 holds surrogates.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    if file.exists() and not file.is_file():
        # A pipe or a device, which cannot be replaced.
        file.write_bytes(data)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    target = file.resolve()
    # A name with an addition may be too long for the file system.
    temp_file = target.with_name(f".{target.name[:50]}.{os.getpid()}.draft")
    try:
        with temp_file.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temp_file.replace(target)
    finally:
        temp_file.unlink(missing_ok=True)


def stale_temp_files(folder: Path) -> list[Path]:
    """The drafts of files whose writer was killed."""
    return [file for file in folder.glob(".*.*") if _TEMP_FILE.fullmatch(file.name)]


def _files(option: str, path: Path, images: Sequence[Path], suffix: str) -> list[Path]:
    """The output file of each image: the path, or, if that is a folder or will be one, a file with the image's name."""
    if path.is_dir() or not (path.suffix or path.exists()):
        files = [path / f"{name}{suffix}" for name in _names(images)]
    elif len(images) > 1:
        raise ValueError(
            f"{option} is {path} for {len(images)} images; expected a folder, which must already exist if its name has "
            "an extension"
        )
    else:
        files = [path]
    for file in files:
        if file.is_dir():
            raise ValueError(f"{file} is a folder; expected the name of a file to write")
        existing = next(parent for parent in (file, *file.parents) if parent.exists())
        if existing not in (file, path) and not existing.is_dir():
            raise ValueError(f"{option} is {path}, but {existing} is no folder")
        if not os.access(existing, os.W_OK):
            raise ValueError(f"{path} cannot be written: permission denied")
    return files


def _names(images: Sequence[Path]) -> list[str]:
    """The images' names without their endings, numbered where they would be the same on some file system."""
    names: list[str] = []
    taken: set[str] = set()
    for image in images:
        numbered = (image.stem if number == 1 else f"{image.stem}-{number}" for number in count(1))
        name = next(name for name in numbered if name.casefold() not in taken)
        taken.add(name.casefold())
        names.append(name)
    return names


def identity(file: Path | str) -> tuple[int, int]:
    """Identifies a file or folder independently of the path to it."""
    status = Path(file).stat()
    return status.st_dev, status.st_ino
