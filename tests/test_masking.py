"""What is refused, through a class that uses the engine."""

import pytest
import torch
from torch import Tensor, nn

from captum_fusion import LayerFusionCam, LayerScoreCam
from tests.conftest import SmallNet


def test_layer_that_is_not_in_the_model(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match="The layer Conv2d is not a module of forward_func"):
        LayerScoreCam(net, nn.Conv2d(3, 3, 1)).attribute(images, target=0)


def test_layer_that_never_runs(net: SmallNet, images: Tensor) -> None:
    net.unused = nn.ReLU6()
    with pytest.raises(ValueError, match="The layer ReLU6 did not run"):
        LayerScoreCam(net, net.unused).attribute(images, target=0)


def test_layer_without_spatial_axes(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"The layer's output has shape \(3, 3\); expected \(N, C, \*s\)"):
        LayerScoreCam(net, net.head).attribute(images, target=0)


def test_layer_with_several_outputs(images: Tensor) -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.split(1, dim=1)

    split = Split()
    with pytest.raises(ValueError, match="The layer's output is a tuple of 3 values; expected a single tensor"):
        LayerScoreCam(lambda x: split(x)[0].flatten(1), split).attribute(images, target=0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, r"no target was given for an output of shape \(3, 3\)"),
        (3, r"target 3 does not fit an output of shape \(3, 3\)"),
        ([0, 1], r"target \[0, 1\] does not fit"),
        ([0, 1, 7], r"target \[0, 1, 7\] does not fit"),
        (torch.tensor([0, 1, -9]), "does not fit"),
        ((0, 1), r"target \(0, 1\) does not fit"),
        ("cat", "target 'cat' does not fit"),
    ],
)
def test_target_that_selects_no_score(net: SmallNet, images: Tensor, target: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerScoreCam(net, net.features).attribute(images, target=target)


def test_integer_inputs(net: SmallNet) -> None:
    with pytest.raises(TypeError, match=r"torch.uint8.*cannot be masked; expected floating-point"):
        LayerScoreCam(net, net.features).attribute(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), target=0)


def test_integer_input_among_others(net: SmallNet, images: Tensor) -> None:
    integers = torch.ones(3, 1, 4, 4, dtype=torch.long)
    with pytest.raises(TypeError, match=r"Input 1 holds torch.int64 values, which cannot be masked"):
        LayerScoreCam(lambda x, _: net(x), net.features).attribute((images, integers), target=0)


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
    with pytest.raises(ValueError, match=r"\[\(2, 360\)\]; expected at least one with 2 spatial axes"):
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


@pytest.mark.parametrize("shape", [(1,), ()])
def test_softmax_over_a_single_class(net: SmallNet, images: Tensor, shape: tuple[int, ...]) -> None:
    def forward(x: Tensor) -> Tensor:
        return net(x)[:, 0].reshape(-1, *shape)

    with pytest.raises(ValueError, match="1 everywhere; expected at least two classes"):
        LayerFusionCam(forward, net.features).attribute(images)
    for activation in ("sigmoid", None):
        attributions = LayerFusionCam(forward, net.features, activation=activation).attribute(images)
        assert attributions.isfinite().all()


def test_output_that_is_no_tensor(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(TypeError, match="forward_func returned dict; expected a tensor of scores"):
        LayerScoreCam(lambda x: {"logits": net(x)}, net.features).attribute(images, target=0)


def test_output_with_another_number_of_rows(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\) for 3 examples"):
        LayerScoreCam(lambda x: net(x).mean(0, keepdim=True), net.features).attribute(images, target=0)
    with pytest.raises(ValueError, match="returned 3 scores for 18 inputs"):
        LayerScoreCam(lambda x: net(x)[:3], net.features).attribute(images, target=0)


def test_scores_that_are_not_finite(net: SmallNet, images: Tensor) -> None:
    def forward(x: Tensor) -> Tensor:
        # A masked image is darker than the image itself.
        return net(x) / (x.flatten(1).mean(1, keepdim=True) > 0.45)

    with pytest.raises(RuntimeError, match="not finite for 18 of 18 masked inputs"):
        LayerScoreCam(forward, net.features).attribute(images * 0 + 0.46 + images / 100, target=0)
    with pytest.raises(RuntimeError, match="not finite for 3 of 3 inputs"):
        LayerScoreCam(lambda x: net(x) * torch.nan, net.features).attribute(images, target=0)


class SmallMemory:
    """A forward_func that runs out of memory for more than some number of rows."""

    def __init__(self, net: SmallNet, most: int, error: BaseException) -> None:
        self.net, self.most, self.error = net, most, error
        self.sizes: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.net(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_halves_the_rows_and_goes_on(net: SmallNet, images: Tensor, error: BaseException) -> None:
    expected = LayerScoreCam(net, net.features).attribute(images, target=0)
    forward = SmallMemory(net, 5, error)
    with pytest.warns(UserWarning, match="Out of memory for 18 masked inputs") as warnings:
        attributions = LayerScoreCam(forward, net.features).attribute(images, target=0)
    assert len(warnings) == 1
    # Two passes of the three images as they are; then 18 masked ones fail, 9 fail, and 4 at a time go through.
    assert forward.sizes == [3, 3, 18, 9, 4, 4, 4, 4, 2]
    torch.testing.assert_close(attributions, expected)


def test_out_of_memory_at_one_row_is_the_original_error(net: SmallNet, images: Tensor) -> None:
    error = MemoryError("not even one")
    forward = SmallMemory(net, 1, error)

    def fail_masked(x: Tensor) -> Tensor:
        forward.most = 1 if len(forward.sizes) < 2 else 0
        return forward(x)

    with pytest.warns(UserWarning, match="Out of memory"), pytest.raises(MemoryError, match="not even one"):
        LayerScoreCam(fail_masked, net.features).attribute(images[:1], target=0)
    assert forward.sizes == [1, 1, 6, 3, 1]


def test_other_errors_are_not_retried(net: SmallNet, images: Tensor) -> None:
    forward = SmallMemory(net, 5, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        LayerScoreCam(forward, net.features).attribute(images, target=0)
    assert forward.sizes == [3, 3, 18]


def test_the_rows_follow_from_what_is_alive_at_once(net: SmallNet) -> None:
    sizes: list[int] = []

    def forward(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return net(x)

    # The image, 3 * 700 * 700 * 4 bytes, the stem's 4 * 350 * 350 * 4 and the 6 * 350 * 350 * 4 of the features are
    # alive together; four times as much fits into 48 MiB. Five channels and the baseline are scored.
    for _ in range(2):
        LayerScoreCam(forward, net.features).attribute(torch.rand(1, 3, 700, 700), target=0)
    assert sizes == [1, 1, 4, 2] * 2


def test_masked_inputs_share_one_buffer_and_one_memory_format(net: SmallNet, images: Tensor) -> None:
    seen: set[tuple[int, bool]] = set()

    def forward(x: Tensor) -> Tensor:
        if len(x) == 4:
            seen.add((x.data_ptr(), x.is_contiguous(memory_format=torch.channels_last)))
        return net(x)

    LayerScoreCam(forward, net.features).attribute(images[:2], target=0, perturbations_per_eval=2)
    assert len(seen) == 1
    assert next(iter(seen))[1]


def test_a_model_that_views_its_feature_maps_gets_contiguous_inputs(net: SmallNet, images: Tensor) -> None:
    class ViewNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = net.features
            self.head = nn.Linear(6 * 30, 3)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.features(net.stem(x))
            return self.head(maps.view(len(x), -1))

    model = ViewNet().eval()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model(images.to(memory_format=torch.channels_last))
    attributions = LayerScoreCam(model, model.features).attribute(images, target=0)
    one_at_a_time = LayerScoreCam(model, model.features).attribute(images, target=0, perturbations_per_eval=1)
    torch.testing.assert_close(attributions, one_at_a_time)
