"""Draws maps over the photograph, with Captum's own visualization."""

from math import ceil
from pathlib import Path

import numpy as np
from captum.attr import visualization
from matplotlib.figure import Figure
from torch import Tensor

_COLUMNS = 3
_PANEL_INCHES = 3.4


def draw(file: Path, title: str, pixels: Tensor, panels: dict[str, Tensor | None]) -> None:
    r"""Writes a picture with a panel for each map.

    Args:
        file (Path): The picture to write.
        title (str): The title over all panels.
        pixels (Tensor): The photograph, (1, 3, H, W) in [0, 1].
        panels (dict[str, Tensor or None]): Maps of shape (1, 1, H, W) in [0, 1] by title, None for the photograph.
    """
    columns = min(_COLUMNS, len(panels))
    rows = ceil(len(panels) / columns)
    figure = Figure(figsize=(columns * _PANEL_INCHES, rows * _PANEL_INCHES * 1.1 + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes:
        axis.set_axis_off()
    original = np.transpose(pixels[0].cpu().numpy(), (1, 2, 0))
    for axis, (panel, attribution) in zip(axes, panels.items(), strict=False):
        # Captum refuses to scale a map of zeros, which has nothing to show anyway.
        if attribution is None or not attribution.any():
            shown, method = original, "original_image"
        else:
            shown, method = np.transpose(attribution[0].cpu().numpy(), (1, 2, 0)), "blended_heat_map"
        visualization.visualize_image_attr(
            shown,
            original,
            method,
            sign="positive",
            cmap="turbo",
            alpha_overlay=0.55,
            outlier_perc=0,
            title=panel,
            plt_fig_axis=(figure, axis),
            use_pyplot=False,
        )
    figure.savefig(file, dpi=110)


def supported_suffixes() -> set[str]:
    """The file name endings that a picture can have."""
    return {f".{name}" for name in Figure().canvas.get_supported_filetypes()}
