"""Against values worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from captum_fusion import functional
from captum_fusion.functional import (
    combine,
    contribution,
    contribution_weights,
    denoise,
    fuse,
    grad_cam_plus_plus_weights,
    normalize,
    percentile_threshold,
    upsample,
    x_grad_cam_weights,
)


def maps(*values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values).unsqueeze(1)


def test_normalize_scales_each_example_alone() -> None:
    given_maps = maps([[1.0, 2.0], [3.0, 5.0]], [[-4.0, 0.0], [4.0, 0.0]])
    expected = maps([[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.5], [1.0, 0.5]])
    torch.testing.assert_close(normalize(given_maps), expected)


def test_normalize_maps_a_constant_to_zeros() -> None:
    for constant in (0.0, 0.1, -3.0, 1e-40, 3e38):
        values = torch.full((2, 1, 3, 3), constant)
        # In one pixel, it differs by rounding.
        values[1, 0, 1, 1] *= 1 + 3e-7
        assert normalize(values).eq(0).all(), constant


def test_normalize_of_the_largest_range() -> None:
    largest = torch.finfo(torch.float32).max
    torch.testing.assert_close(normalize(maps([[-largest, 0.0], [largest, largest]])), maps([[0.0, 0.5], [1.0, 1.0]]))


@given(arrays.arrays(np.float32, (2, 1, 5), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_normalize_stays_in_range(values: np.ndarray) -> None:
    result = normalize(torch.from_numpy(values))
    assert result.isfinite().all()
    assert result.ge(0).all()
    assert result.le(1).all()


def test_upsample_interpolates_between_pixel_centres() -> None:
    expected_row = [0.0, 0.25, 0.75, 1.0]
    torch.testing.assert_close(upsample(maps([[0.0, 1.0], [0.0, 1.0]]), (4, 4)), maps([expected_row] * 4))
    torch.testing.assert_close(upsample(torch.tensor([[[0.0, 1.0]]]), (4,)), torch.tensor([[expected_row]]))
    cube = torch.tensor([0.0, 1.0]).expand(1, 1, 2, 2, 2)
    torch.testing.assert_close(upsample(cube, (1, 2, 4)), torch.tensor(expected_row).expand(1, 1, 1, 2, 4))


def test_upsample_to_the_same_size_changes_nothing() -> None:
    values = torch.rand(2, 1, 5, 3)
    assert torch.equal(upsample(values, (5, 3)), values)


def test_percentile_is_linear_between_order_statistics() -> None:
    # Sorted: 1, 2, 4, 8, so that 25 percent lies three quarters of the way from 1 to 2.
    values = maps([[8.0, 1.0], [4.0, 2.0]])
    for percentile, expected in ((0.0, 1.0), (25.0, 1.75), (50.0, 3.0), (90.0, 6.8)):
        torch.testing.assert_close(percentile_threshold(values, percentile), torch.tensor([expected]))


@given(
    arrays.arrays(np.float64, (1, 1, 37), elements=st.floats(-100, 100)),
    st.floats(0, 100, exclude_max=True, allow_subnormal=False),
)
def test_percentile_agrees_with_numpy(values: np.ndarray, percentile: float) -> None:
    ours = percentile_threshold(torch.from_numpy(values), percentile).item()
    assert ours == pytest.approx(np.percentile(values, percentile), abs=1e-9)


def test_percentile_of_more_than_sixteen_million_values() -> None:
    values = torch.arange(2**24 + 2**20, dtype=torch.float64).view(1, 1, -1)
    assert percentile_threshold(values, 50.0).item() == (values.numel() - 1) / 2


def test_denoise_drops_what_lies_below_the_percentile() -> None:
    # tau = 0.3 * 0.75 + 0.6 * 0.25 = 0.375, below which 0.1 and 0.3 lie; 0.6 stays 0.6, since the minimum is now 0.
    given_maps = maps([[0.1, 0.3], [0.6, 1.0]])
    torch.testing.assert_close(denoise(given_maps, 125 / 3), maps([[0.0, 0.0], [0.6, 1.0]]))


def test_denoise_at_zero_percent_only_normalizes() -> None:
    given_maps = maps([[0.2, 0.4], [0.6, 1.0]])
    torch.testing.assert_close(denoise(given_maps, 0.0), maps([[0.0, 0.25], [0.5, 1.0]]))


def test_contribution_weights() -> None:
    for contributions, weighting, expected in [
        ((0.6, 0.2), "normalized", (0.75, 0.25)),
        ((0.6, 0.2), "released", (0.75, 0.25)),
        ((0.6, 0.2), "raw", (0.6, 0.2)),
        ((-0.6, 0.2), "normalized", (0.0, 1.0)),
        ((-0.6, 0.2), "raw", (0.0, 0.2)),
        ((-0.6, -0.2), "normalized", (0.5, 0.5)),
        ((0.0, -0.2), "raw", (1.0, 1.0)),
        # The released script divides by the sum as it is: -0.6 / -0.4 and 0.2 / -0.4.
        ((-0.6, 0.2), "released", (1.5, -0.5)),
        ((-0.6, -0.2), "released", (0.75, 0.25)),
        ((0.0, 0.0), "released", (0.5, 0.5)),
        ((1e-45, 1e-45), "normalized", (0.5, 0.5)),
        ((3e38, 3e38), "normalized", (0.5, 0.5)),
    ]:
        weights = contribution_weights(*(torch.tensor([value]) for value in contributions), weighting)
        message = f"{weighting} of {contributions}"
        torch.testing.assert_close(
            torch.cat(weights), torch.tensor(expected), msg=lambda text, of=message: f"{of}: {text}"
        )


def test_contribution_within_rounding_is_none() -> None:
    kept = torch.tensor([0.3, 0.1, 0.1 + 3e-8, 1e-9, 2e-9])
    without = torch.tensor([0.1, 0.3, 0.1, 1e-9, 1e-9])
    torch.testing.assert_close(
        contribution(kept, without), torch.tensor([0.2, -0.2, 0.0, 0.0, 1e-9]), atol=0, rtol=1e-6
    )


def test_combine() -> None:
    # 0.75 D + 0.25 R = [[0.75, 0.25], [0.5, 0]], whose maximum is 0.75.
    combined = combine(
        maps([[1.0, 0.0], [0.5, 0.0]]), maps([[0.0, 1.0], [0.5, 0.0]]), torch.tensor([0.75]), torch.tensor([0.25])
    )
    torch.testing.assert_close(combined, maps([[1.0, 1 / 3], [2 / 3, 0.0]]))


def test_fuse() -> None:
    # A = 0.5 C = [[0.5, 0], [0.5, 0.25]], B = 0.5 R = [[0.5, 0], [0, 0.5]], sim = [[1, 1], [0.5, 0.75]],
    # F = [[0.5, 0], [0.25 + 0.125, 0.375 + 0.09375]].
    fused = fuse(
        maps([[1.0, 0.0], [1.0, 0.5]]), maps([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.5]), torch.tensor([0.5])
    )
    torch.testing.assert_close(fused, maps([[1.0, 0.0], [0.75, 0.9375]]))


def test_fuse_clips_the_similarity_of_raw_weights() -> None:
    # A = [3, 0.5, 0], B = 0: sim = [0, 0.5, 1], F = [1.5, 0.375, 0].
    fused = fuse(torch.tensor([[[1.0, 1 / 6, 0.0]]]), torch.zeros(1, 1, 3), torch.tensor([3.0]), torch.tensor([1.0]))
    torch.testing.assert_close(fused, torch.tensor([[[1.0, 0.25, 0.0]]]))


def examples() -> dict[str, tuple[object, ...]]:
    """Arguments for each of the equations."""
    values = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = torch.tensor([0.75, 0.5]), torch.tensor([0.25, 0.5])
    return {
        "normalize": (values[:, :1] / 16 + 0.9,),
        "upsample": (values[:, :1], (11,)),
        "percentile_threshold": (values[:, :1], 40.0),
        "denoise": (values[:, :1] / 16 + 0.9, 40.0),
        "contribution": (torch.tensor([0.5, 0.9]), torch.tensor([0.46, 0.95])),
        "contribution_weights": weights,
        "combine": (values[:, :1], values[:, 1:2], *weights),
        "fuse": (values[:, :1], values[:, 1:2], *weights),
        "weighted": (values, values[..., 0]),
        "weighted_sum": (values, values[..., 0]),
        "grad_cam_plus_plus_weights": (values - 1, values),
        "x_grad_cam_weights": (values - 1, values),
        "group_maps": (values, values, 4),
        "denoised_gradient_map": (values - 1, values, 40.0),
        "gaussian_blur": (values, 5, 2.0),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    """Only the arguments are rounded."""
    for name, example in examples().items():
        equation = getattr(functional, name)
        arguments = [value.to(dtype) if isinstance(value, torch.Tensor) else value for value in example]
        widened = [value.float() if isinstance(value, torch.Tensor) else value for value in arguments]
        expected, ours = equation(*widened), equation(*arguments)
        if isinstance(expected, torch.Tensor):
            expected, ours = (expected,), (ours,)
        for value, wide in zip(ours, expected, strict=True):
            same = torch.allclose(value.float(), wide, atol=tolerance, rtol=tolerance)
            assert same, f"{name}: {value}; expected {wide}"


def test_channels_whose_sum_is_zero_but_for_rounding_have_no_x_grad_cam_weight() -> None:
    # Deviations from a mean, as InstanceNorm gives them, whose sum is a few units in the last place of the terms.
    activations = torch.randn(1, 5, 14, 14)
    activations = activations - activations.mean((2, 3), keepdim=True)
    sums = activations.sum((2, 3))
    assert sums.any()
    assert sums.abs().max() < 1e-4
    assert x_grad_cam_weights(torch.randn(1, 5, 14, 14), activations).eq(0).all()
    # A small sum that is none of rounding's counts: 1e-2 among terms of the size of 1.
    assert x_grad_cam_weights(torch.ones(1, 5, 14, 14), activations + 1e-2 / 196).sub(1).abs().max() < 0.1


def test_a_divisor_that_is_zero_but_for_rounding_gives_no_grad_cam_plus_plus_weight() -> None:
    # 2 g^2 + sum(A) g^3 with g = 2 / 0.7 and sum(A) = -0.7, from seven terms of -0.1 that are not exact.
    activations = torch.full((1, 1, 7), -0.1)
    gradients = torch.zeros(1, 1, 7)
    for above in range(-3, 4):
        gradients[0, 0, 3] = 2 / 0.7 + above * 2.4e-7
        assert grad_cam_plus_plus_weights(gradients, activations).eq(0).all()
