"""Draws maps over the image."""

import warnings
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from captum_fusion._app.explanation import Explanation
from captum_fusion._app.messages import close_names, one_line, printable
from captum_fusion._app.options import DEFAULT_ALPHA
from captum_fusion.metrics import instances

COLOURS = "turbo"
"""The colour map of all maps."""
_CAPTION = "P: probability of the class for the photograph, and for the photograph masked by each map"
_LETTERS = 30
_MOST_LINES = 3
_PANEL_INCHES = 2.4
_DPI = 140


def draw(
    explanations: Sequence[Explanation], suffix: str, alpha: float = DEFAULT_ALPHA, boxes: float | None = None
) -> bytes:
    """Draws explanations of an image as the content of a file: a panel for it and for each map, class by class.

    Args:
        explanations (Sequence[Explanation]): The same methods' explanations of one or several classes.
        suffix (str): The ending of the file.
        alpha (float): As for ``overlay``.
        boxes (float or None): The share of a map's maximum from which boxes are drawn around its regions.
    """
    panels = 1 + len(explanations[0].maps)
    # A row for each class, as long as the panels remain large enough to see something.
    rows = ceil(panels / (4 if len(explanations) == 1 else 6))
    columns, lines = ceil(panels / rows), rows * len(explanations)
    size = (columns * _PANEL_INCHES + 0.7, lines * (_PANEL_INCHES + 0.4) + 0.2)
    figure = Figure(figsize=size, layout="compressed")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for explanation, block in zip(explanations, axes.reshape(len(explanations), -1), strict=True):
        _draw_block(block, explanation, alpha, boxes)
    colours = ScalarMappable(cmap=_on_grey(alpha))
    figure.colorbar(colours, ax=axes, fraction=0.03, pad=0.01, aspect=16 * lines, ticks=(0, 0.5, 1), label="map")
    first = explanations[0]
    model = first.model if first.precision == "float32" else f"{first.model} in {first.precision}"
    figure.supxlabel(_wrapped(f"{model}; {_CAPTION}", columns * _LETTERS), size="small")
    content = render(figure, suffix)
    return _palettized(content) if suffix.lower() == ".png" else content


def _palettized(content: bytes) -> bytes:
    """A drawing with 256 colours, dithered: a third of the size, for what is shown and not measured."""
    with Image.open(BytesIO(content)) as drawing:
        rgb = drawing.convert("RGB")
    colours = rgb.reduce(4).quantize(255, method=Image.Quantize.MEDIANCUT)
    # Pure white for the ground; Pillow looks up colours too coarsely to find it.
    colours.putpalette([*(colours.getpalette() or [])[: 255 * 3], 255, 255, 255])
    palettized = rgb.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
    palettized.paste(255, mask=rgb.convert("L").point([0] * 255 + [255]))
    output = BytesIO()
    palettized.save(output, "PNG")
    return output.getvalue()


def _draw_block(axes: np.ndarray, explanation: Explanation, alpha: float, boxes: float | None) -> None:
    """Draws the image and the maps of a class."""
    image = np.transpose(explanation.pixels[0].numpy(), (1, 2, 0))
    axes[0].imshow(image, interpolation="bicubic")
    axes[0].set_title(f"{_wrapped(explanation.category)}\nP = {explanation.probability:.2f}", size="medium")
    for axis, (name, values) in zip(axes[1:], explanation.maps.items(), strict=False):
        overlay(axis, image, values[0, 0].numpy(), alpha)
        if boxes is not None:
            draw_boxes(axis, values, boxes)
        masked = f"P = {explanation.masked_probabilities[name]:.2f}" if values.any() else "an empty map"
        axis.set_title(f"{_wrapped(name)}\n{masked}", size="medium")


def overlay(axis: Any, image: np.ndarray, values: np.ndarray, alpha: float = DEFAULT_ALPHA) -> None:
    """Shows a map (H, W) over an image (H, W, 3), both in [0, 1].

    The image is grey, so that every colour is the map's. The map is as opaque as it is high: where it is 0, the
    image is uncovered.

    Args:
        axis (matplotlib.axes.Axes): Where to draw.
        image (ndarray): The image.
        values (ndarray): The map.
        alpha (float): The opacity of the map where it is 1, in [0, 1].
    """
    axis.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
    axis.imshow(colormaps[COLOURS](values, alpha=alpha * values), interpolation="bilinear")


def draw_boxes(axis: Any, values: Tensor, threshold: float) -> None:
    """Draws a box around each region of a map (1, 1, H, W), from a share of its maximum on."""
    for x1, y1, x2, y2 in instances(values, threshold)[0]["boxes"].tolist():
        # The centres of pixels are at whole numbers, the edges of boxes between them.
        axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor="white"))


def _on_grey(alpha: float) -> ListedColormap:
    """The colours of an overlay on medium grey."""
    values = np.linspace(0, 1, 256)[:, None]
    covered = alpha * values
    return ListedColormap(covered * colormaps[COLOURS](values[:, 0])[:, :3] + (1 - covered) * 0.5)


def _wrapped(text: str, width: int = _LETTERS) -> str:
    """A text in a few lines, shortened where it is longer."""
    return fill(text, width, max_lines=_MOST_LINES, placeholder=" …")


def render(figure: Figure, suffix: str) -> bytes:
    """Renders a figure as the content of a file with this ending; ``$`` in its texts is a plain character."""
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    families = _families({letter for text in texts for letter in text.get_text()})
    for text in texts:
        text.set(parse_math=False, fontfamily=families)
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    content = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(content, format=suffix.removeprefix("."), dpi=_DPI, bbox_inches="tight")
    return content.getvalue()


def _families(letters: set[str]) -> list[str]:
    """The font families that draw these letters: the default one, and others for what it lacks."""
    families = [*rcParams["font.family"]]
    missing = {ord(letter) for letter in letters if letter.isprintable()} - _characters(
        findfont(FontProperties(family=families))
    )
    for font in fontManager.ttflist if missing else ():
        # Matplotlib's font of last resort has a box for every character.
        if missing & _characters(font.fname) and not font.name.startswith("Last Resort"):
            families.append(font.name)
            missing -= _characters(font.fname)
    if missing:
        warnings.warn(f"No installed font has {''.join(map(chr, sorted(missing)))}; boxes replace them", stacklevel=2)
    return families


@cache
def _characters(file: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(file).get_charmap())
    except RuntimeError:  # A font of bitmaps, as some for emoji.
        return frozenset()


def check_drawing_format(file: Path) -> None:
    """Refuses a name that no drawing can be saved under, before anything is computed for it."""
    formats = sorted(f".{name}" for name in Figure().canvas.get_supported_filetypes())
    suffix = file.suffix.lower()
    if suffix not in formats:
        raise ValueError(
            f"An image cannot be written as {file.name}; expected one of {', '.join(formats)}."
            f"{close_names(suffix, formats)}"
        )
    figure = Figure(figsize=(1, 1))
    figure.suptitle("a")
    try:
        # Some formats need a program that may not be there, as .pgf needs TeX.
        render(figure, suffix)
    except Exception as error:
        raise ValueError(f"An image cannot be written as {file.name}: {one_line(error)}") from error
