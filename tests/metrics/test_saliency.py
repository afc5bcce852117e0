import numpy as np
import pytest
import torch
from captum.attr import visualization
from matplotlib.figure import Figure
from torch import Tensor

from captum_fusion.metrics import saliency_map


def test_sums_channels_and_keeps_the_positive_part_by_default() -> None:
    attributions = torch.tensor([[[3.0, -1.0, 1.0], [1.0, -1.0, -3.0]]])
    torch.testing.assert_close(saliency_map(attributions, (3,)), torch.tensor([[[1.0, 0.0, 0.0]]]))


@pytest.mark.parametrize("sign", ["positive", "negative", "absolute_value"])
def test_signs_mean_what_they_mean_in_captum(sign: str) -> None:
    attributions = torch.randn(1, 3, 8, 8)
    # Captum scales by the largest value; these maps reach 0, so that min-max normalization does the same.
    figure = Figure()
    axis = figure.subplots()
    values = attributions[0].permute(1, 2, 0).numpy()
    visualization.visualize_image_attr(values, sign=sign, outlier_perc=0, plt_fig_axis=(figure, axis), use_pyplot=False)
    shown = torch.from_numpy(np.asarray(axis.images[0].get_array())).float()
    ours = saliency_map(attributions, (8, 8), sign)[0, 0]
    torch.testing.assert_close(ours, (shown - shown.min()) / (1 - shown.min()), atol=1e-5, rtol=0)


def test_all_signs_keep_their_order() -> None:
    torch.testing.assert_close(
        saliency_map(torch.tensor([[[-2.0, 0.0, 2.0]]]), (3,), "all"), torch.tensor([[[0.0, 0.5, 1.0]]])
    )


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (0.3, 1.0), (-2.0, 0.0)])
def test_constant_maps(value: float, expected: float) -> None:
    assert saliency_map(torch.full((2, 1, 3, 3), value), (6, 6)).eq(expected).all()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_layer_resolution_is_brought_to_the_size(axes: int) -> None:
    maps = saliency_map(torch.randn(2, 1, *(3, 2, 4)[:axes]), (9, 8, 7)[:axes])
    assert maps.shape == (2, 1, *(9, 8, 7)[:axes])
    assert maps.flatten(1).amin(1).eq(0).all()
    assert maps.flatten(1).amax(1).eq(1).all()


@pytest.mark.parametrize(
    ("attributions", "sign", "message"),
    [
        (
            torch.zeros(2, 1, 4),
            "positive",
            r"shape \(2, 1, 4\) .*expected real .* with 2 spatial axes",
        ),
        (torch.zeros(2, 1, 4, 4), "both", "sign is 'both'; expected one of"),
        (torch.tensor([[[[0.0]]], [[[torch.nan]]]]), "positive", "hold NaN in 1 of 2 examples"),
    ],
)
def test_refuses(attributions: Tensor, sign: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saliency_map(attributions, (8, 8), sign)
