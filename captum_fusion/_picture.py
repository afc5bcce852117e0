"""Draws maps over the photograph, with Captum's own visualization."""

from collections.abc import Sequence
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from captum.attr import visualization
from matplotlib.figure import Figure

from captum_fusion._files import check_writable, write_whole
from captum_fusion._names import close_names, one_line
from captum_fusion.explain import Explanation

COLOURS = "turbo"
"""The colour map of all maps."""
OVERLAY = 0.55
"""How much of a map's colour covers the photograph, in [0, 1]."""
_COLUMNS = 3
_PANEL_INCHES = 3.4
_DPI = 110


def draw(file: Path, explanation: Explanation) -> None:
    """Writes a picture with a panel for the photograph and one for each map."""
    write_whole(file, drawn([explanation], file.suffix))


def drawn(explanations: Sequence[Explanation], suffix: str, alpha: float = OVERLAY) -> bytes:
    """A picture of one or several explanations of a photograph, as the content of a file with this ending."""
    first = explanations[0]
    columns = min(_COLUMNS, 1 + len(first.maps))
    rows = ceil((1 + len(first.maps)) / columns)
    figure = Figure(
        figsize=(columns * _PANEL_INCHES, len(explanations) * rows * _PANEL_INCHES * 1.1 + 0.4), layout="constrained"
    )
    names = " and ".join(explanation.category for explanation in explanations)
    figure.suptitle(f"{names} by {first.model}, layer {first.layer}, and what remains of its probability")
    all_axes = np.atleast_1d(figure.subplots(len(explanations) * rows, columns)).reshape(len(explanations), -1)
    photograph = np.transpose(first.pixels[0].numpy(), (1, 2, 0))
    for explanation, axes in zip(explanations, all_axes, strict=True):
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(photograph)
        name = "photograph" if len(explanations) == 1 else explanation.category
        axes[0].set_title(f"{name}: {explanation.probability:.1%}")
        for axis, (name, values) in zip(axes[1:], explanation.maps.items(), strict=False):
            overlay(axis, photograph, values[0, 0].numpy(), alpha)
            empty = "" if values.any() else " (an empty map)"
            axis.set_title(f"{name} keeps {explanation.kept[name]:.1%}{empty}")
    return rendered(figure, suffix)


def overlay(axis: Any, photograph: np.ndarray, values: np.ndarray, alpha: float = OVERLAY) -> None:
    """Shows a map (H, W) over a photograph (H, W, 3), both in [0, 1]; an empty map leaves the photograph alone."""
    if not values.any():
        axis.imshow(photograph)
        return
    visualization.visualize_image_attr(
        values[..., None],
        photograph,
        "blended_heat_map",
        sign="positive",
        cmap=COLOURS,
        alpha_overlay=alpha,
        outlier_perc=0,
        plt_fig_axis=(axis.get_figure(), axis),
        use_pyplot=False,
    )


def rendered(figure: Figure, suffix: str) -> bytes:
    """A figure as the content of a file with this ending."""
    content = BytesIO()
    figure.savefig(content, format=suffix.removeprefix("."), dpi=_DPI)
    return content.getvalue()


def check_picture(file: Path) -> None:
    """Refuses a picture that cannot be written, before anything is computed for it."""
    known = sorted(f".{name}" for name in Figure().canvas.get_supported_filetypes())
    suffix = file.suffix.lower()
    if suffix not in known:
        raise ValueError(
            f"A picture cannot be written as {file.name}; expected one of {', '.join(known)}."
            f"{close_names(suffix, known)}"
        )
    check_writable(file)
    figure = Figure(figsize=(1, 1))
    figure.suptitle("a")
    try:
        # Some formats need a program that may not be there, as .pgf needs TeX.
        rendered(figure, suffix)
    except Exception as error:
        raise ValueError(f"A picture cannot be written as {file.name}: {one_line(error)}") from error
