"""Arguments that are refused before any long work, through a class that masks."""

import pytest
import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_fusion import LayerFusionCam, LayerGroupCam, LayerScoreCam
from tests.conftest import SmallNet

pytestmark = pytest.mark.every_device


def test_layer_that_is_not_in_the_model(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match="The layer Conv2d is not a module of forward_func"):
        LayerScoreCam(net, nn.Conv2d(3, 3, 1)).attribute(images, target=0)


def test_layer_that_never_runs(net: SmallNet, images: Tensor) -> None:
    net.unused = nn.ReLU6()
    with pytest.raises(ValueError, match="The layer ReLU6 did not run"):
        LayerScoreCam(net, net.unused).attribute(images, target=0)


def test_layer_without_spatial_axes(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"The layer's output has shape \(3, 3\); expected .*\(N, C, \*s\)"):
        LayerScoreCam(net, net.head).attribute(images, target=0)


def test_layer_with_several_outputs(images: Tensor) -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.split(1, dim=1)

    split = Split()
    with pytest.raises(ValueError, match="The layer's output has 3 values; expected a single tensor"):
        LayerScoreCam(lambda x: split(x)[0].flatten(1), split).attribute(images, target=0)


def test_target_that_selects_no_score(net: SmallNet, images: Tensor) -> None:
    for target, message in [
        (None, r"target None selects scores of shape \(3, 3\) from an output of shape \(3, 3\)"),
        (3, r"target 3 .*does not fit an output of shape \(3, 3\)"),
        ([0, 1], r"target \[0, 1\] .*does not fit"),
        ([0, 1, 7], r"target \[0, 1, 7\] .*does not fit"),
        (torch.tensor([0, 1, -9]), "does not fit"),
        ((0, 1), r"target \(0, 1\) .*does not fit"),
        ("cat", "target 'cat' .*does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            LayerScoreCam(net, net.features).attribute(images, target=target)
    with pytest.raises(ValueError, match=r"For several classes of one input, pass inputs\.expand\(2, -1, -1, -1\)"):
        LayerScoreCam(net, net.features).attribute(images[:1], target=[0, 1])


def test_integer_inputs(net: SmallNet) -> None:
    with pytest.raises(TypeError, match=r"torch.uint8.*cannot be masked; expected floating-point"):
        LayerScoreCam(net, net.features).attribute(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), target=0)


@pytest.mark.parametrize("inputs", [[torch.rand(1, 3, 8, 8)], (), "image"])
def test_inputs_that_are_no_tensors(net: SmallNet, inputs: object) -> None:
    with pytest.raises(TypeError, match="expected one or more tensors"):
        LayerScoreCam(net, net.features).attribute(inputs, target=0)


def test_batch_sizes_that_differ(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[\(3, 3, 12, 10\), \(2, 4\)\]; expected the same number of examples"):
        LayerScoreCam(lambda x, _: net(x), net.features).attribute((images, torch.rand(2, 4)), target=0)
    with pytest.raises(ValueError, match="at least 1"):
        LayerScoreCam(net, net.features).attribute(images[:0], target=0)


def test_inputs_without_the_layers_axes(net: SmallNet) -> None:
    with pytest.raises(ValueError, match=r"\[\(2, 360\)\].* with the same number of spatial axes"):
        LayerScoreCam(lambda x: net(x.view(2, 3, 12, 10)), net.features).attribute(torch.rand(2, 360), target=0)


def test_additional_tensor_without_a_row_per_example(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"additional_forward_args\[1\] is a tensor of shape \(5,\)"):
        LayerScoreCam(lambda x, *_: net(x), net.features).attribute(images, 0, (None, torch.rand(5)))


@pytest.mark.parametrize(
    ("baselines", "error", "message"),
    [
        (torch.zeros(2, 3, 12, 10), ValueError, r"baseline of input 0 has shape \(2, 3, 12, 10\)"),
        (torch.zeros(1, 3, 1, 1), ValueError, "expected a number"),
        ((0, 0), ValueError, "2 baselines were given for 1 inputs"),
        ("black", TypeError, "The baseline of input 0 is 'black'"),
    ],
)
def test_bad_baselines(net: SmallNet, images: Tensor, baselines: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LayerScoreCam(net, net.features).attribute(images, target=0, baselines=baselines)


def test_output_with_another_number_of_rows(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\) for 3 examples"):
        LayerScoreCam(lambda x: net(x).mean(0, keepdim=True), net.features).attribute(images, target=0)


class Patches(nn.Module):
    """Tokens (N, T, C), one for each patch of two pixels along each of one to three axes, after a class token."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.patches = convolution(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.new_ones(len(x), 1, 6), tokens], dim=1)
        return self.head(self.norm(tokens).tanh().mean(1))


# The gradient methods at the layer's resolution never look at the input's axes, as LayerGradCam does not.
@pytest.mark.parametrize("algorithm", [LayerScoreCam, LayerGroupCam, LayerFusionCam])
def test_tokens_of_a_picture_or_a_volume_without_a_view(algorithm: type[LayerAttribution]) -> None:
    for axes, message in ((2, "spatial_view"), (3, r"spatial_view.*grid")):
        model = Patches(axes).eval()
        with pytest.raises(ValueError, match=message):
            algorithm(model, model.norm).attribute(torch.rand(2, 3, *(8, 8, 4)[:axes]), target=1)
