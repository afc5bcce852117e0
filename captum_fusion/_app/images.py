"""Photographs from files, as 8-bit RGB whatever their type."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339
_SIGNED = 2


# What a stranger's picture may be: kinds that are read without running another program, as PostScript is, and so large.
_STRANGERS_KINDS = {"AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"}
_STRANGERS_PIXELS = 50_000_000


class PictureError(ValueError):
    """A picture that cannot be explained, whatever else is asked; the message begins with its name."""


class Photograph(NamedTuple):
    """A picture in RGB, and what had to be done to it, empty if nothing."""

    image: Image.Image
    note: str = ""
    name: str = "The picture"


def open_photograph(file: Path, stranger: bool = False) -> Photograph:
    """Reads a picture, upright and in RGB; of several frames the first.

    Args:
        file (Path): The file.
        stranger (bool): Whether the file comes from somebody who is not to be trusted, who sees the file's name only.

    Raises:
        OSError: If there is no such file, or if it may not be read.
        PictureError: If it is no picture, beginning with the file's name.
    """
    name = file.name if stranger else str(file)
    Image.init()
    # Releases of Pillow differ in what they read.
    kinds = sorted(_STRANGERS_KINDS & Image.OPEN.keys()) if stranger else None
    with _opened(file, name, kinds) as image:
        width, height = image.size
        if stranger and width * height > _STRANGERS_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels; expected at most {_STRANGERS_PIXELS / 1e6:g} million")
        return as_rgb(image)._replace(name=name)


def check_photograph(file: Path) -> None:
    """Refuses what does not begin as a picture does, without reading it whole.

    Raises:
        OSError: As ``open_photograph``, and so does the other.
        PictureError: Likewise.
    """
    if not file.exists() and set(file.name) & set("*?["):
        raise FileNotFoundError(f"No file matches {file}")
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; expected pictures, such as {file}/*.jpg")
    with _opened(file, str(file)):
        pass


@contextmanager
def _opened(file: Path, name: str, kinds: list[str] | None = None) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=kinds) as image:
            yield image
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"{name} cannot be read: it is not a picture of a known kind") from error
    except Exception as error:  # Readers of broken files raise nearly everything.
        raise PictureError(f"{name} cannot be read: {error}") from error


def as_rgb(image: Image.Image) -> Photograph:
    """A picture upright and in RGB: values of more than 8 bits scaled by their type's range, transparency on white.

    Raises:
        ValueError: If floating-point values are not in [0, 1], or if integers are negative.
    """
    notes = []
    if image.mode.startswith("I") or image.mode == "F":
        upright = ImageOps.exif_transpose(image)
        values, top, kind = _numbers(image, np.asarray(upright))
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= top:
            raise ValueError(f"its {kind} values reach from {low:g} to {high:g}; expected values in [0, {top:g}]")
        image = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
        notes.append(f"{kind} values are scaled from [0, {top:g}]")
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layered = ImageOps.exif_transpose(image).convert("RGBA")
        if layered.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent parts are shown on white")
        white = Image.new("RGBA", layered.size, "white")
        image = Image.alpha_composite(white, layered)
    else:
        image = ImageOps.exif_transpose(image)
    return Photograph(image.convert("RGB"), "; ".join(notes))


def _numbers(image: Image.Image, values: np.ndarray) -> tuple[np.ndarray, float, str]:
    """The values of a picture of one channel, the top of their type's range, and what the type is called."""
    if image.mode == "F":
        return values.astype(np.float64), 1, "floating-point"
    # Pillow reads 16 bits into 32 for some kinds of files.
    bits, signed = (16, False) if image.mode != "I" or image.format in ("PNG", "PPM") else (32, True)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and _BITS_PER_SAMPLE in tags:
        bits, signed = tags[_BITS_PER_SAMPLE][0], tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    if bits == 32 and not signed:
        values = values.view(np.uint32)
    return values.astype(np.float64), 2.0 ** (bits - signed) - 1, f"{bits}-bit"
