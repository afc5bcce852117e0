import threading

import pytest
import torch
from torch import Tensor, nn

from captum_fusion import LayerAblationCam
from tests.conftest import Counter, SmallNet


@pytest.mark.parametrize("sign", [1, -1])
def test_worked_out_by_hand(sign: int) -> None:
    # f = 2 (a + b) + 3 c for channels [a, b] = [1, 2] and [c, d] = [-1, 5]: y = 3; y_0 = -3, y_1 = 6.
    # Of -f it is the same with the other sign, where dividing by y would give this very map again.
    x = torch.tensor([[[1.0, 2.0], [-1.0, 5.0]]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        values = identity(inputs)
        return sign * (2 * values[:, 0].sum(1) + 3 * values[:, 1, 0])

    attributions = LayerAblationCam(forward, identity).attribute(x)
    torch.testing.assert_close(attributions, sign * torch.tensor([[[2.0 * 1 - 1.0 * -1, 2.0 * 2 - 1.0 * 5]]]))


def test_a_score_of_zero_still_tells_the_channels_apart() -> None:
    identity = nn.Identity()
    x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
    attributions = LayerAblationCam(lambda x: identity(x)[:, 0].sum(1) - identity(x)[:, 1].sum(1), identity)
    # The layer's last run alone is ablated: without the second channel, y_1 = 3.
    torch.testing.assert_close(attributions.attribute(x), -3 * x[:, 1:])


def test_channels_of_zeros_need_no_forward_pass(net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight[:3] = 0
        net.features.bias[:3] = 0
    counter = Counter(net)
    LayerAblationCam(counter, net.features).attribute(images, target=0)
    # The images as they are, three channels of each, and one as a check.
    assert counter.rows <= 3 + 3 * 3 + 1


def test_a_dead_layer_gives_zeros(net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight.zero_()
        net.features.bias.zero_()
    assert LayerAblationCam(net, net.features).attribute(images, target=0).eq(0).all()


class Embedded(nn.Module):
    """Tokens, which cannot be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 3)
        self.features = nn.Conv1d(3, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(self.embedding(tokens).mT).relu().mean(2))


def test_inputs_without_spatial_axes_are_explained() -> None:
    net = Embedded()
    tokens = torch.randint(10, (2, 7))
    attributions = LayerAblationCam(net, net.features).attribute(tokens, target=1)
    assert attributions.shape == (2, 1, 5)
    assert attributions.any()


def test_what_another_thread_runs_is_not_ablated(net: SmallNet, images: Tensor) -> None:
    """The other thread calls the model itself, which no lock of ours can see."""
    with torch.no_grad():
        expected = net(images)
    found = []

    def other() -> None:
        with torch.no_grad():
            found.append(net(images))

    passes = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes > 1:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return net(x)

    alone = LayerAblationCam(net, net.features).attribute(images, target=0)
    ours = LayerAblationCam(forward, net.features).attribute(images, target=0, perturbations_per_eval=2)
    torch.testing.assert_close(ours, alone)
    assert len(found) > 1
    for scores in found:
        assert torch.equal(scores, expected)


def test_a_layer_that_stops_running_in_this_thread_is_refused(net: SmallNet, images: Tensor) -> None:
    """As the replicas of a DataParallel over several devices do."""
    passes = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 1:
            return net(x)
        result = []
        thread = threading.Thread(target=lambda: result.append(net(x)))
        thread.start()
        thread.join()
        return result[0]

    with pytest.raises((ValueError, RuntimeError), match=r"ran 0 times in this thread.*DataParallel"):
        LayerAblationCam(forward, net.features).attribute(images, target=0)
    assert not net.features._forward_hooks


@pytest.mark.parametrize("failing", [2, 3])
def test_no_hook_remains_after_a_failure_of_an_ablated_pass(failing: int, net: SmallNet, images: Tensor) -> None:
    passes = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == failing:
            raise KeyError("out of luck")
        return net(x)

    with pytest.raises(KeyError, match="out of luck"):
        LayerAblationCam(forward, net.features).attribute(images, target=0, perturbations_per_eval=1)
    assert not net.features._forward_hooks
    assert not net.features._forward_pre_hooks
