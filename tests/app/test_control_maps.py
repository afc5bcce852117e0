import pytest
import torch
from torch import Tensor

from captum_fusion._app.methods import CentredGaussian, LayerRandomMap
from tests.conftest import SmallNet


def test_each_input_has_a_random_map_of_its_own_whatever_the_batch_and_the_seed(net: SmallNet, images: Tensor) -> None:
    random_map = LayerRandomMap(net, net.features)
    maps = random_map.attribute(images, target=0)
    assert maps.shape == (3, 1, 6, 5)
    torch.manual_seed(7)
    assert torch.equal(random_map.attribute(images[1:2], target=2), maps[1:2])
    assert len(maps.flatten().unique()) == maps.numel()
    assert 0 <= maps.min() < maps.max() < 1


def test_the_gaussian_is_highest_in_the_middle_and_falls_as_far_along_each_axis() -> None:
    values = CentredGaussian(torch.nn.Identity()).attribute(torch.rand(2, 3, 8, 16))
    assert values.shape == (2, 1, 8, 16)
    assert torch.equal(values, values.flip(2))
    assert torch.equal(values, values.flip(3))
    assert values[0, 0, 3:5, 7:9].min() == values.max()
    # A quarter of a side from the middle it has fallen to exp(-1/2) of its height, a half of it to exp(-2).
    row = CentredGaussian(torch.nn.Identity()).attribute(torch.rand(1, 3, 1001))[0, 0]
    assert row[500] == 1
    assert row[750].item() == pytest.approx(0.60653, abs=2e-3)
    assert row[1000].item() == pytest.approx(0.13534, abs=2e-3)
