from typing import Any

import pytest
import scipy.stats
import torch
from captum.attr import InputXGradient, LayerGradCam, NoiseTunnel, Saliency
from torch import Tensor, nn

from captum_fusion import FusedAttributions, LayerFusionCam
from captum_fusion.functional import rank_correlation
from captum_fusion.metrics import weight_randomization
from tests.conftest import SmallNet


def test_rank_correlation_is_scipys_also_with_ties() -> None:
    first, second = torch.randint(6, (2, 4, 40)).double()
    for found, a, b in zip(rank_correlation(first, second), first, second, strict=True):
        assert found.item() == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-9)


def test_ranks_worked_out_by_hand() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 4, 2.5, 2.5, 1; a constant has no ranks.
    first = torch.tensor([[0.0, 5.0, 5.0, 9.0], [1.0, 2.0, 3.0, 4.0], [3.0, 3.0, 3.0, 3.0]])
    second = torch.tensor([[3.0, 2.0, 2.0, -1.0], [7.0, 7.0, 7.0, 7.0], [5.0, 5.0, 5.0, 5.0]])
    torch.testing.assert_close(rank_correlation(first, second), torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("randomization", ["cascading", "independent"])
def test_equals_randomizing_by_hand(randomization: Any, images: Tensor) -> None:
    """Modules without reset_parameters, a scale, are drawn around their mean; of this one there is a single value."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Scaled(), nn.Flatten(), nn.Linear(4 * 10 * 8, 3))
    method = LayerGradCam(net, net[0])
    with pytest.warns(UserWarning, match="did not change the weights of '1'"):
        found = weight_randomization(method, images, target=1, randomization=randomization, seed=5, sign="all")
    assert list(found) == ["3", "1", "0"]
    before = method.attribute(images, target=1)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for position, name in enumerate(found):
        if randomization == "independent":
            net.load_state_dict(state)
        torch.manual_seed(5 + position)
        if name != "1":
            net.get_submodule(name).reset_parameters()
        after = method.attribute(images, target=1)
        for example in range(3):
            maps = [
                torch.nn.functional.interpolate(map_[example : example + 1], (12, 10), mode="bilinear").flatten()
                for map_ in (before.detach(), after.detach())
            ]
            expected = scipy.stats.spearmanr(*maps).statistic
            assert found[name][example].item() == pytest.approx(expected, abs=1e-2)


def test_attributions_that_do_not_see_the_weights_stay(net: SmallNet, images: Tensor) -> None:
    class Edges(Saliency):
        def attribute(self, inputs: Tensor, **_: object) -> Tensor:
            return inputs

    for values in weight_randomization(Edges(net), images, target=1).values():
        torch.testing.assert_close(values, torch.ones(3))
    assert weight_randomization(Edges(net), images, target=1, model=net)["head"].gt(0.999).all()
    # A model that does not run, whose weights another one uses.
    weights = nn.Linear(3, 3)
    used = weight_randomization(Saliency(lambda x: net(x) @ weights.weight), images, target=1, model=weights)
    assert used[""].lt(0.999).all()
    changed = weight_randomization(Saliency(net), images, target=1)
    assert torch.stack(list(changed.values())).lt(0.999).all()


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_and_chance_stay_as_they_were(failing: bool, images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(320, 3)).eval()
    nn.init.uniform_(net[1].running_mean)
    net[0].register_buffer("kept", torch.rand(3), persistent=False)
    before = {name: value.clone() for name, value in (*net.named_parameters(), *net.named_buffers())}
    state = torch.get_rng_state()

    class Failing(InputXGradient):
        calls = 0

        def attribute(self, inputs: Tensor, target: int) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise KeyError("out of luck")
            return super().attribute(inputs, target)

    if failing:
        with pytest.raises(KeyError, match="out of luck"):
            weight_randomization(Failing(net), images, target=1)
    else:
        weight_randomization(LayerFusionCam(net, net[2]), images, target=1)
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        assert torch.equal(value, before[name]), name
        assert value.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_a_reset_makes_new_are_restored(images: Tensor) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reset_parameters()

        def reset_parameters(self) -> None:
            self.weight = nn.Parameter(torch.randn(4, 1, 1))
            self.register_buffer("shift", torch.randn(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.shift

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Scaled(), nn.Flatten(), nn.Linear(320, 3))
    before = {name: (value, value.clone()) for name, value in (*net.named_parameters(), *net.named_buffers())}
    alone = weight_randomization(Saliency(net), images, target=1, randomization="independent")
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        assert value is before[name][0], name
        assert torch.equal(value, before[name][1]), name
    # The last module is randomized after the others are restored.
    with torch.random.fork_rng():
        torch.manual_seed(2)
        first = Saliency(net).attribute(images, target=1)
        net[0].reset_parameters()
    found = rank_correlation(*(maps.sum(1).flatten(1) for maps in (first, Saliency(net).attribute(images, target=1))))
    torch.testing.assert_close(alone["0"], found)


def test_every_kind_of_attribution_is_taken(net: SmallNet, images: Tensor) -> None:
    table = torch.rand(3, 3)
    fused = FusedAttributions([LayerGradCam(net, net.stem), NoiseTunnel(LayerGradCam(net, net.features))])
    assert list(weight_randomization(fused, images, target=1)) == ["head", "features", "stem"]
    several = LayerGradCam(lambda x, table, power: net(x) * table**power, net.features)
    found = weight_randomization(several, (images, table), 2, 1, net)
    assert found["stem"].shape == (3,)
    assert list(weight_randomization(Saliency(torch.jit.trace(net, images)), images, target=1)) == list(found)
    options = {"attribution_kwargs": {"relu_attributions": True}}
    plain, rectified = (
        weight_randomization(LayerGradCam(net, net.features), images, target=1, **kwargs) for kwargs in ({}, options)
    )
    torch.testing.assert_close(plain, rectified)


def test_refuses(net: SmallNet, images: Tensor) -> None:
    for given, error, message in [
        ({"attribution_method": "saliency"}, TypeError, "attribution_method is 'saliency'; expected an instance"),
        ({"attribution_method": Saliency(lambda x: x)}, TypeError, "model is <function .*; expected the torch.nn.Mod"),
        ({"attribution_method": Saliency(nn.ReLU())}, ValueError, "model is a ReLU without parameters"),
        ({"model": nn.Linear(3, 3)}, ValueError, "No module of model, a Linear, ran, and no attribution changed"),
        ({"randomization": "all"}, ValueError, "randomization is 'all'; expected one of"),
        ({"sign": "both"}, ValueError, "sign is 'both'; expected one of"),
    ]:
        with pytest.raises(error, match=message):
            weight_randomization(**{"attribution_method": Saliency(net), "inputs": images, "target": 0} | given)
