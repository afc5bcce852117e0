"""Photographs from files, as 8-bit RGB whatever their type."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339
_SIGNED = 2


class PictureError(ValueError):
    """A picture that cannot be explained, whatever else is asked; the message begins with its name."""


class Photograph(NamedTuple):
    """A picture in RGB, and what had to be done to it, empty if nothing."""

    image: Image.Image
    note: str = ""


def open_photograph(file: Path) -> Photograph:
    """Reads a picture, upright and in RGB.

    Raises:
        OSError: If there is no such file, or if it may not be read.
        PictureError: If it is no picture.
    """
    with _opened(file) as image:
        return as_rgb(image)


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
    with _opened(file):
        pass


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"{file} cannot be read: it is not a picture of a known kind") from error
    except Exception as error:  # Readers of broken files raise nearly everything.
        raise PictureError(f"{file} cannot be read: {error}") from error


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
