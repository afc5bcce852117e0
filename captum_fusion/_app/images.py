"""Photographs from files, as 8-bit RGB whatever their type."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from captum_fusion._app.messages import install_hint

# TIFF's tags, the photometry whose zero is white, and the sample format of signed integers.
_BITS_PER_SAMPLE, _PHOTOMETRY, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
HEIF = (".heic", ".heif")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".avif", ".gif", ".jfif"),
    *HEIF,
)
_ORIENTATION = 0x0112
# The transpositions that turn an image of each EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Kinds of untrusted images that are read without running another program, as PostScript is, and their largest size.
_SAFE_KINDS = {"AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"}
_MOST_PIXELS = 50_000_000

SAMPLE_NAME = "espresso_and_cat"
_SAMPLE_SIDE = 448
# The parts of the photographs that the sample shows.
_COFFEE, _CHELSEA = (90, 20, 530, 240), (0, 40, 451, 265)


class ImageError(ValueError):
    """An image that cannot be explained, whatever the other arguments; the message begins with its name."""


class Photograph(NamedTuple):
    """An image in RGB, and a note on how it was converted, empty if it was not."""

    image: Image.Image
    note: str = ""
    name: str = "The image"


def open_photograph(file: Path, untrusted: bool = False) -> Photograph:
    """Reads an image, upright and in RGB; of several frames the first.

    Args:
        file (Path): The file.
        untrusted (bool): Whether the file is untrusted; messages then show only its name, and its size is limited.

    Raises:
        OSError: If there is no such file, or if it may not be read.
        ImageError: If it is no image, beginning with the file's name.
    """
    name = file.name if untrusted else str(file)
    Image.init()
    # Releases of Pillow differ in what they read.
    kinds = sorted(_SAFE_KINDS & Image.OPEN.keys()) if untrusted else None
    with _open(file, name, kinds) as image:
        width, height = image.size
        if untrusted and width * height > _MOST_PIXELS:
            raise ValueError(f"it has {width} x {height} pixels; expected at most {_MOST_PIXELS / 1e6:g} million")
        return as_rgb(image)._replace(name=name)


def find_images(folder: Path) -> list[Path]:
    """The images in a folder, by their names.

    Raises:
        ValueError: If there is none.
    """
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in EXTENSIONS and file.is_file()]
    if not files:
        raise ValueError(f"{folder} is a folder without images; images in its subfolders are not used")
    return files


def check_image(file: Path) -> None:
    """Refuses a file that does not begin as an image does, without reading all of it.

    Raises:
        OSError: If there is no such file, or if it may not be read.
        ImageError: If it is no image.
    """
    if not file.exists() and set(file.name) & set("*?["):
        raise FileNotFoundError(f"No file matches {file}")
    with _open(file, str(file)):
        pass


def sample_photograph() -> Photograph:
    """Two photographs, a cup of espresso above a cat: two objects, either of which can be explained.

    Raises:
        ValueError: If the package that brings them is not installed.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The sample photographs need the package {error.name}: {install_hint('demo')}, or pass an image"
        ) from error
    both = Image.new("RGB", (_SAMPLE_SIDE, _SAMPLE_SIDE))
    for position, (values, part) in enumerate(((data.coffee(), _COFFEE), (data.chelsea(), _CHELSEA))):
        half = Image.fromarray(values).resize((_SAMPLE_SIDE, _SAMPLE_SIDE // 2), box=part)
        both.paste(half, (0, position * _SAMPLE_SIDE // 2))
    return Photograph(both, name=SAMPLE_NAME)


@contextmanager
def _open(file: Path, name: str, kinds: list[str] | None = None) -> Iterator[Image.Image]:
    try:
        if file.suffix.lower() in HEIF and kinds is None:
            try:
                import_module("pillow_heif").register_heif_opener()
            except ModuleNotFoundError as error:
                raise ValueError(f"it needs the package pillow-heif: {install_hint('heif')}") from error
        with Image.open(file, formats=kinds) as image:
            yield image
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} cannot be read: it is not an image in a supported format") from error
    except Exception as error:  # Readers of broken files raise nearly everything.
        raise ImageError(f"{name} cannot be read: {error}") from error


def as_rgb(image: Image.Image) -> Photograph:
    """An image upright and in RGB: values of more than 8 bits scaled by their type's range, transparency on white.

    Raises:
        ValueError: If floating-point values are not in [0, 1], or if integers are negative.
    """
    notes = []
    # Phones store a second, smaller image beside the photograph, which is no frame.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        notes.append(f"only frame {image.tell() + 1} of several is used")
    upright = _upright(image, notes)
    if image.mode.startswith("I") or image.mode == "F":
        values, top, kind = _numbers(image, np.asarray(upright))
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= top:
            raise ValueError(f"its {kind} values reach from {low:g} to {high:g}; expected values in [0, {top:g}]")
        # Pillow inverts values of up to 8 bits only.
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRY) == _WHITE_IS_ZERO:
            values = top - values
        upright = Image.fromarray((values * (255 / top)).round().astype(np.uint8))
        notes.append(f"{kind} values are scaled from [0, {top:g}]")
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layered = upright.convert("RGBA")
        if layered.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent parts are shown on white")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    rgb = upright.convert("RGB")
    # The orientation does not apply to the upright image.
    rgb.info.clear()
    return Photograph(rgb, "; ".join(notes))


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """The image, turned by its EXIF orientation."""
    image.load()
    orientation = exif_orientation(image)
    if orientation is None:
        notes.append("its EXIF block is broken and ignored")
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def exif_orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, 1 without one, None if the block is broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # The reader of broken EXIF blocks raises nearly everything; the pixels may be whole.
        return None
    # A broken block may hold a list.
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


def _numbers(image: Image.Image, values: np.ndarray) -> tuple[np.ndarray, float, str]:
    """The values of an image of one channel, the top of their type's range, and the type's name."""
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
