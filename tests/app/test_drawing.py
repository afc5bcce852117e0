import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from captum_fusion._app.drawing import COLOURS, draw_boxes, overlay


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_a_map_covers_the_photograph_as_much_as_it_is(alpha: float) -> None:
    photograph = np.random.default_rng(0).random((8, 8, 3))
    values = np.repeat([[0.0, 0.25, 0.5, 1.0]], 8, axis=0).repeat(2, axis=1)
    figure = Figure(figsize=(1, 1), dpi=8)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    overlay(axis, photograph, values, alpha)
    for image in axis.images:
        image.set_interpolation("nearest")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    grey = photograph.mean(axis=2, keepdims=True)
    weight = alpha * values[..., None]
    expected = weight * colormaps[COLOURS](values)[..., :3] + (1 - weight) * grey
    np.testing.assert_allclose(drawn, expected, atol=0.012)


def test_boxes_enclose_the_pixels_of_each_region() -> None:
    values = torch.zeros(1, 1, 6, 8)
    values[0, 0, 1:3, 2:5], values[0, 0, 5, 7] = 1.0, 0.6
    for threshold, expected in ((0.5, [(1.5, 0.5, 4.5, 2.5), (6.5, 4.5, 7.5, 5.5)]), (0.7, [(1.5, 0.5, 4.5, 2.5)])):
        axis = Figure().add_subplot()
        draw_boxes(axis, values, threshold)
        assert [patch.get_bbox().extents.tolist() for patch in axis.patches] == [list(box) for box in expected]
