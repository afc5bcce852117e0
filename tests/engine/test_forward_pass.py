"""A call leaves everything as it was, whatever else runs, and never mixes what others run into its maps."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_fusion import LayerFusionCam, LayerScoreCam
from captum_fusion.metrics import confidence_drop, confidence_increase, deletion, insertion
from tests.conftest import Counter, SmallNet
from tests.methods import KINDS, PATHS, run

pytestmark = pytest.mark.every_device

METRICS = [confidence_drop, confidence_increase, insertion, deletion]
# Nothing waits that long but what is stuck.
STUCK = 600


class TrainingNet(nn.Module):
    """Everything that a forward pass may disturb: statistics, chance, and its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return self.head(self.dropout(self.features(self.norm(x)).mean((2, 3))))


def snapshot(model: nn.Module, images: Tensor) -> list[object]:
    hooks = [
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    global_hooks = len(nn.modules.module._global_forward_hooks) + len(nn.modules.module._global_forward_pre_hooks)
    tensors = [*model.state_dict().values(), images, torch.get_rng_state()]
    if images.is_cuda:
        tensors.append(torch.cuda.get_rng_state(images.device))
    gradients = [(parameter.requires_grad, parameter.grad) for parameter in [*model.parameters(), images]]
    modes = [module.training for module in model.modules()]
    chance = [random.getstate(), np.random.get_state()[1].tolist()]
    return [
        hooks,
        chance,
        global_hooks,
        [tensor.tolist() for tensor in tensors],
        gradients,
        modes,
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("subject", [*PATHS, *METRICS])
def test_nothing_is_disturbed(images: Tensor, subject: Any) -> None:
    """By a call that succeeds, one that is refused, and one whose layer fails."""
    model = TrainingNet().to(images.device)
    model.head.bias.grad = torch.ones_like(model.head.bias)
    before = snapshot(model, images)
    buffers = list(model.buffers())
    with pytest.warns(UserWarning, match=r"model.eval\(\)"):
        run(subject, model, model.features, images, target=1)
    assert snapshot(model, images) == before
    with pytest.raises(ValueError, match="target 99"):
        run(subject, lambda x: model(x), model.features, images, target=99)
    assert snapshot(model, images) == before

    def fail(*_: object) -> None:
        raise KeyError("broken")

    model.features.forward = fail
    with pytest.raises(KeyError, match="broken"):
        run(subject, model, model.features, images, target=1)
    assert snapshot(model, images) == before
    assert all(kept is buffer for kept, buffer in zip(model.buffers(), buffers, strict=True))


def test_a_model_in_training_mode_is_warned_about_once(images: Tensor) -> None:
    model = TrainingNet().to(images.device)
    with pytest.warns(UserWarning, match="training mode and has BatchNorm2d, Dropout: its scores") as warnings:
        LayerFusionCam(model, model.features).attribute(images, target=0)
    assert sum("training mode" in str(warning.message) for warning in warnings) == 1


def test_random_numbers_are_noticed_beside_other_threads_and_alone(
    net: SmallNet, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_rng_state()
    for threads in (1, 2):
        monkeypatch.setattr(threading, "active_count", lambda threads=threads: threads)
        with pytest.warns(UserWarning, match="draws random numbers"):
            LayerScoreCam(lambda x: nn.functional.dropout(net(x)), net.features).attribute(images, target=0)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("error")
def test_no_warning_in_evaluation_mode(images: Tensor) -> None:
    model = TrainingNet().eval().to(images.device)
    LayerFusionCam(model, model.features).attribute(images, target=0)


class Counting(nn.Module):
    """Changes its buffers in evaluation mode too: in place, by assigning a new one, and from an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("lowest", torch.empty(0))
        self.register_buffer("last", None)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x).relu()
        seen = maps.detach().mean((0, 2, 3))
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * seen
        self.lowest = seen if not self.lowest.numel() else torch.minimum(self.lowest, seen)
        self.last = seen
        self.scratch.copy_(x.detach().mean((0, 2, 3)))
        return self.head(maps.mean((2, 3)))


def buffers(model: nn.Module) -> list[tuple[str, Tensor | None, list[Any] | None]]:
    return [
        (name, buffer, None if buffer is None else buffer.tolist())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]


@pytest.mark.parametrize("subject", [*KINDS, confidence_drop, insertion])
def test_buffers_that_change_in_evaluation_mode_stay(subject: Any, images: Tensor) -> None:
    model = Counting().eval().to(images.device)
    before = buffers(model)
    for forward in (model, lambda x: model(x)):
        run(subject, forward, model.features, images, target=1)
        for (name, kept, values), (_, buffer, now) in zip(before, buffers(model), strict=True):
            assert now == values, name
            assert buffer is kept, name


class Elsewhere:
    """Runs a function in another thread each time that the model in front of it has run, and waits for it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.pool = ThreadPoolExecutor(1)
        self.results: list[Any] = []

    def during(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            output = forward(*inputs)
            self.results.append(self.pool.submit(self.function).result(timeout=STUCK))
            return output

        return run


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("subject", KINDS)
def test_a_model_that_another_thread_trains_goes_on(subject: Any, net: SmallNet, images: Tensor) -> None:
    """It is neither rolled back nor warned about, and what it draws stays distinct."""
    trained = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).to(images.device)
    batch = torch.rand(4, 3, 6, 6, device=images.device)

    def train() -> float:
        trained(batch)
        return torch.rand((), device=images.device).item()

    other = Elsewhere(train)
    expected = run(subject, net, net.features, images, target=1)
    for _ in range(5):
        assert torch.equal(run(subject, other.during(net), net.features, images, target=1), expected)
    assert trained[1].num_batches_tracked == len(other.results) >= 5
    assert len(set(other.results)) == len(other.results)


@pytest.mark.parametrize("algorithm", KINDS)
def test_two_threads_with_a_model_each(algorithm: type[LayerAttribution], images: Tensor) -> None:
    nets = [net.eval().to(images.device) for net in (SmallNet(), SmallNet(channels=5))]
    expected = [algorithm(net, net.features).attribute(images, target=1) for net in nets]

    def explain(index: int) -> list[Tensor]:
        net = nets[index]
        return [algorithm(net, net.features).attribute(images, target=1) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(explain, index) for index in (0, 1)]
        for maps, future in zip(expected, found, strict=True):
            for ours in future.result(timeout=STUCK):
                torch.testing.assert_close(ours, maps)


class Meeting(nn.Module):
    """Lets another thread run something in the middle of a forward pass, and goes on when it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[threading.Thread] = []
        self.other: Callable[[], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.other is not None and len(self.started) < 4 and threading.current_thread() not in self.started:
            self.started.append(threading.Thread(target=self.other, daemon=True))
            self.started[-1].start()
            self.started[-1].join(timeout=STUCK)
            assert not self.started[-1].is_alive()
        return x


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("algorithm", KINDS)
def test_two_threads_with_one_model_are_right_or_refused(
    algorithm: type[LayerAttribution], where: str, images: Tensor
) -> None:
    """A thread is in the middle of a forward pass, before or after the layer, while others explain the same model."""
    net = SmallNet().eval().to(images.device)
    meeting = Meeting()
    order = [net.features, meeting] if where == "after" else [meeting, net.features]
    model = nn.Sequential(net.stem, *order, net.relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head)
    others = torch.rand_like(images)

    def explain(inputs: Tensor, target: int) -> Tensor | str:
        try:
            return algorithm(model, net.features).attribute(inputs, target=target)
        except RuntimeError as refusal:
            return str(refusal)

    def right_or_refused(found: Tensor | str, expected: Tensor) -> bool:
        return "thread" in found if isinstance(found, str) else torch.equal(found, expected)

    expected = explain(images, 1), explain(others, 2)
    found: list[Tensor | str] = []
    meeting.other = lambda: found.append(explain(others, 2))
    ours = explain(images, 1)
    assert right_or_refused(ours, expected[0]), ours
    assert len(found) == len(meeting.started) > 0
    assert all(right_or_refused(value, expected[1]) for value in found), found
    assert any(isinstance(value, Tensor) for value in (ours, *found)), "somebody is served"
    # And afterwards everything is as before.
    meeting.other = None
    assert torch.equal(explain(images, 1), expected[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_frozen_scripted_submodule(net: SmallNet, images: Tensor) -> None:
    """It has no attribute ``training``."""

    class Net(nn.Module):
        def __init__(self, tail: nn.Module) -> None:
            super().__init__()
            self.stem, self.features, self.tail = net.stem, net.features, tail

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.features(self.stem(x)))

    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head).eval()
    frozen = torch.jit.freeze(torch.jit.script(tail))
    assert not hasattr(frozen, "training")
    expected = LayerFusionCam(Net(tail).eval(), net.features).attribute(images, target=1)
    model = Net(tail).eval()
    model.tail = frozen
    torch.testing.assert_close(LayerFusionCam(model, net.features).attribute(images, target=1), expected)


class Crops(nn.Module):
    """The scores of a picture are the mean over those of its crops, which are rows of one batch."""

    def __init__(self, crops: int) -> None:
        super().__init__()
        self.crops = crops
        self.features = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2] // 2
        crops = torch.stack([x[:, :, start : start + size] for start in range(self.crops)], dim=1)
        scores = self.head(self.features(crops.flatten(0, 1)).relu().mean((2, 3)))
        return scores.unflatten(0, (len(x), self.crops)).mean(1)


@pytest.mark.parametrize(("algorithm", "examples"), zip(KINDS, (1, 3, 1), strict=True))
def test_a_layer_that_sees_several_rows_for_each_example(
    algorithm: type[LayerAttribution], examples: int, images: Tensor
) -> None:
    model = Crops(4).eval().to(images.device)
    counter = Counter(model)
    with pytest.raises(ValueError, match=rf"(?s){4 * examples}.*(row|example)"):
        algorithm(counter, model.features).attribute(images[:examples], target=1)
    assert counter.rows <= examples, "refused before any masked pass"


@pytest.mark.parametrize("algorithm", KINDS)
def test_a_model_that_merges_batch_and_channels_by_view(algorithm: type[LayerAttribution], images: Tensor) -> None:
    class Gated(nn.Module):
        def __init__(self, merge: Callable[..., Tensor]) -> None:
            super().__init__()
            self.merge = merge
            self.features = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.features(x)
            n, c = maps.shape[:2]
            gate = self.merge(maps, (n * c, -1)).sigmoid().mean(1).view(n, c, 1, 1)
            return self.head((maps * gate).relu().mean((2, 3)))

    viewing, reshaping = (Gated(merge).to(images.device) for merge in (Tensor.view, Tensor.reshape))
    reshaping.load_state_dict(viewing.state_dict())
    for examples in (1, 3):
        ours = algorithm(viewing, viewing.features).attribute(images[:examples], target=1)
        theirs = algorithm(reshaping, reshaping.features).attribute(images[:examples], target=1)
        torch.testing.assert_close(ours, theirs)


def test_a_progress_bar_and_an_error_leave_the_session(net: SmallNet, images: Tensor) -> None:
    """An error in a masked pass ends the session: the next call is served."""

    def forward(x: Tensor) -> Tensor:
        if len(x) > len(images):
            raise KeyError("masked")
        return net(x)

    with pytest.raises(KeyError, match="masked"):
        LayerScoreCam(forward, net.features).attribute(images, target=0)
    expected = LayerScoreCam(net, net.features).attribute(images, target=0)
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(LayerScoreCam(net, net.features).attribute, images, target=0).result(timeout=STUCK)
    assert torch.equal(elsewhere, expected)
