"""Everything follows the device of the inputs, held on a GPU that is pretended where there is none."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_fusion import LayerFusionCam
from captum_fusion.metrics import confidence_drop, confidence_increase, deletion, insertion
from tests.conftest import SmallNet
from tests.methods import PATHS, accepted
from tests.pretend import DEVICE, Pretended, PretendedGpu, pretended

# Target forms, of which the tensors are on the CPU.
TARGETS = [1, [0, 1, 2], torch.tensor([0, 1, 2]), [(0,), (1,), (2,)]]
LIST = TARGETS[1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The driver's part of what the package asks of a GPU."""
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def gradients(outputs: Any, inputs: Any, **_: Any) -> tuple[Tensor, ...]:
        """In place of the engine, which asks the driver: some gradients, the same on every device."""
        assert outputs
        return tuple(
            value.detach().square() - 0.1 for value in (inputs if isinstance(inputs, (tuple, list)) else (inputs,))
        )

    monkeypatch.setattr(torch.autograd, "grad", gradients)
    with torch.no_grad(), PretendedGpu():
        yield


def values(of: Any) -> Tensor:
    assert isinstance(of, Pretended)
    assert of.device == DEVICE
    return of.values


@pytest.mark.usefixtures("gpu")
def test_the_pretended_gpu_refuses_tensors_of_the_cpu() -> None:
    """As a real one does; else the other tests here hold nothing."""
    scores = torch.rand(3, 4, device=DEVICE)
    assert isinstance(scores, Pretended)
    for use in (
        lambda: scores.gather(1, torch.tensor([[0], [1], [2]])),
        lambda: scores + torch.rand(3, 4),
        lambda: torch.lerp(scores, scores, torch.rand(3, 4)),
        lambda: torch.cat([scores, torch.rand(3, 4)]),
        lambda: nn.functional.linear(scores, torch.rand(2, 4)),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            use()
    assert torch.equal(values(scores.cpu().to(DEVICE)), values(scores))


@pytest.mark.parametrize(
    ("algorithm", "target"),
    [(path, LIST) for path in PATHS] + [(LayerFusionCam, target) for target in TARGETS if target is not LIST],
)
@pytest.mark.usefixtures("gpu")
def test_targets_arguments_and_baselines_follow_the_inputs(
    algorithm: Any, target: Any, net: SmallNet, images: Tensor
) -> None:
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return net(x) * scale[:, None]

    scale, baseline = torch.rand(3) + 0.5, torch.rand_like(images)
    attribution = algorithm(forward, net.features)
    options = accepted(attribution, {"perturbations_per_eval": 2, "target": target, "baselines": baseline})
    expected = attribution.attribute(images, additional_forward_args=scale, **options).detach()
    pretended(net)
    # A baseline may be on the CPU still.
    for given in (pretended(baseline), baseline):
        options = accepted(attribution, options | {"baselines": given})
        ours = attribution.attribute(pretended(images), additional_forward_args=pretended(scale), **options)
        torch.testing.assert_close(values(ours.detach()), expected)


@pytest.mark.parametrize(
    ("metric", "target"),
    [*((metric, LIST) for metric in (confidence_drop, confidence_increase, deletion))]
    + [(insertion, target) for target in TARGETS],
)
@pytest.mark.usefixtures("gpu")
def test_metrics_follow_the_inputs(metric: Any, target: Any, net: SmallNet, images: Tensor) -> None:
    maps = torch.rand(3, 1, 6, 5)
    expected = metric(net, images, maps, target=target)
    pretended(net)
    ours = metric(net, pretended(images), pretended(maps), target=target)
    torch.testing.assert_close(values(ours), expected)
