import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

# One thread for each worker, also for the processes that tests start: small networks gain nothing by more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

# No clock fails an example on a busy machine.
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
# The same examples in every run.
settings.register_profile("default", max_examples=20, derandomize=True, **UNTIMED)
# Other examples in every run; a failure prints what reproduces it, and is tried first in the next run.
settings.register_profile("fuzz", max_examples=5000, derandomize=False, print_blob=True, **UNTIMED)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_device: runs on the GPU as well where there is one")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs what is marked every_device on the GPU as well where there is one."""
    everywhere = metafunc.definition.get_closest_marker("every_device") is not None
    if everywhere and "device" in metafunc.fixturenames and torch.cuda.is_available():
        metafunc.parametrize("device", [torch.device("cpu"), torch.device("cuda", 0)], ids=str)


@pytest.fixture
def device() -> torch.device:
    """The device of the fixtures' networks and inputs."""
    return torch.device("cpu")


def on(device: torch.device, value: Any) -> Any:
    """The tensors in it on a device."""
    if isinstance(value, tuple):
        return tuple(on(device, part) for part in value)
    if isinstance(value, dict):
        return {name: on(device, part) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


class SmallNet(nn.Module):
    """Two convolutions and a head, in 1 to 3 dimensions; the first channel of ``features`` is constant."""

    def __init__(self, axes: int = 2, classes: int = 3, channels: int = 6) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.stem = convolution(3, 4, 3, stride=2, padding=1)
        self.features = convolution(4, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(channels, classes)
        with torch.no_grad():
            self.features.weight[0] = 0
            self.head.weight *= 8

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.features(self.stem(x))).flatten(2).mean(2))


class Counter:
    """A forward function that counts its calls and their rows."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.sizes: list[int] = []

    def __call__(self, *inputs: Any) -> Any:
        self.sizes.append(len(inputs[0]))
        return self.forward(*inputs)

    @property
    def rows(self) -> int:
        return sum(self.sizes)


def forked(function: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    """A process of its own, without the seconds that a fresh one needs for its imports. It can run no gradients."""
    process = multiprocessing.get_context("fork").Process(target=_in_one_thread, args=(function, *arguments))
    process.start()
    return process  # type: ignore[return-value]


def _in_one_thread(function: Callable[..., object], *arguments: object) -> None:
    # The threads of the parent do not follow.
    torch.set_num_threads(1)
    function(*arguments)


@pytest.fixture
def net(device: torch.device) -> SmallNet:
    return SmallNet().eval().to(device)


@pytest.fixture
def images(device: torch.device) -> Tensor:
    return torch.rand(3, 3, 12, 10).to(device)
