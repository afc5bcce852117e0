"""Masked rows to scores: how many reach the model, in which chunks, and what makes their scores wrong."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_fusion import (
    LayerAblationCam,
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerScoreCam,
    LayerUnionCam,
    LayerXGradCam,
)
from captum_fusion.metrics import confidence_drop, confidence_increase, deletion, insertion
from tests.conftest import Counter, SmallNet
from tests.methods import AT_INPUT_SIZE, KINDS, LAYER_PATHS, run, takes

pytestmark = pytest.mark.every_device

METRICS = [confidence_drop, confidence_increase, insertion, deletion]
MASKED = [method for method in LAYER_PATHS if takes(method, "perturbations_per_eval")]
# Masks of channels, channels left out, and masks of fused maps.
FEW_MASKED = [LayerScoreCam, LayerAblationCam, LayerFusionCam]


# One more row than needed may reach the model, to see whether scores depend on the batch.
CONTROL = 1


def test_passes_are_made_once(net: SmallNet, images: Tensor) -> None:
    for algorithm, calls, rows in [
        # The unmasked images, then their five live channels and, for the constant one, the blank.
        (LayerScoreCam, 2, 3 + 3 * 6),
        (LayerGradCamPlusPlus, 1, 3),
        (LayerXGradCam, 1, 3),
        # Five live groups and the blank; one group of one image is 0 everywhere.
        (LayerGroupCam, 2, 3 + 3 * 6 - 1),
        # Score-CAM's; the blank, D and R in one call; then C.
        (LayerUnionCam, 4, 3 + 3 * 6 + 3 * 3 + 3),
        # One more of Captum's Grad-CAM.
        (LayerFusionCam, 5, 2 * 3 + 3 * 6 + 3 * 3 + 3),
    ]:
        counter = Counter(net)
        algorithm(counter, net.features).attribute(images, target=0)
        assert len(counter.sizes) <= calls
        assert rows <= counter.rows <= rows + CONTROL
        assert counter.sizes[0] == len(images)


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_makes_its_passes_once(metric: Any, net: SmallNet, images: Tensor) -> None:
    counter = Counter(net)
    curve = metric in (insertion, deletion)
    metric(counter, images, torch.rand_like(images), target=0, **{"steps": 9} if curve else {})
    rows = 3 + 3 * (10 if curve else 1)
    assert len(counter.sizes) == 2
    assert rows <= counter.rows <= rows + CONTROL


def test_scores_that_are_not_finite(net: SmallNet, images: Tensor) -> None:
    def forward(x: Tensor) -> Tensor:
        # A masked image is darker than the image itself.
        return net(x) / (x.flatten(1).mean(1, keepdim=True) > 0.45)

    with pytest.raises(RuntimeError, match=r"not finite for 18 of 1[89] masked inputs"):
        LayerScoreCam(forward, net.features).attribute(images * 0 + 0.46 + images / 100, target=0)
    with pytest.raises(RuntimeError, match="not finite for 3 of 3 unmasked inputs"):
        LayerScoreCam(lambda x: net(x) * torch.nan, net.features).attribute(images, target=0)


class SmallMemory(Counter):
    """A forward function that runs out of memory for more than some number of rows."""

    def __init__(self, forward: Callable[..., Tensor], most: int, error: BaseException) -> None:
        super().__init__(forward)
        self.most, self.error = most, error

    def __call__(self, *inputs: Tensor) -> Tensor:
        if len(inputs[0]) > self.most:
            self.sizes.append(-len(inputs[0]))
            raise self.error
        return super().__call__(*inputs)


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
    with pytest.warns(UserWarning, match=r"Out of memory for 1[89] masked inputs") as warned:
        attributions = LayerScoreCam(forward, net.features).attribute(images, target=0)
    assert len(warned) == 1
    torch.testing.assert_close(attributions, expected)
    failed = [-size for size in forward.sizes if size < 0]
    assert len(failed) == 2
    assert failed[1] == failed[0] // 2
    done = [size for size in forward.sizes if size > 0]
    assert done[0] == len(images)
    assert done[1] == failed[1] // 2
    assert 18 <= sum(done[1:]) <= 18 + CONTROL


def test_out_of_memory_at_one_row_is_the_original_error(net: SmallNet, images: Tensor) -> None:
    forward = SmallMemory(net, 1, MemoryError("not even one"))

    def fail_masked(x: Tensor) -> Tensor:
        forward.most = 0 if forward.sizes else 1
        return forward(x)

    with pytest.warns(UserWarning, match="Out of memory"), pytest.raises(MemoryError, match="not even one"):
        LayerScoreCam(fail_masked, net.features).attribute(images[:1], target=0)
    assert forward.sizes[0] == 1
    assert forward.sizes[-1] == -1
    assert forward.sizes[1:] == sorted(set(forward.sizes[1:]))


def test_other_errors_are_not_retried(net: SmallNet, images: Tensor) -> None:
    forward = SmallMemory(net, 5, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        LayerScoreCam(forward, net.features).attribute(images, target=0)
    assert len(forward.sizes) == 2


def test_the_rows_follow_from_what_is_alive_at_once() -> None:
    net = SmallNet().eval()
    # The image, 3 * 1000 * 1000 * 4 bytes, the stem's 4 * 500 * 500 * 4 and the 6 * 500 * 500 * 4 of the features are
    # alive together; four times as much comes closest to 96 MiB. Five channels and the baseline are scored.
    for _ in range(2):
        counter = Counter(net)
        LayerScoreCam(counter, net.features).attribute(torch.rand(1, 3, 1000, 1000), target=0)
        assert counter.sizes[:2] == [1, 4]
        assert 2 <= sum(counter.sizes[2:]) <= 2 + CONTROL


def test_masked_inputs_share_one_buffer_and_one_memory_format(net: SmallNet, images: Tensor) -> None:
    seen: set[tuple[int, bool]] = set()

    def forward(x: Tensor) -> Tensor:
        if len(x) == 4:
            seen.add((x.data_ptr(), x.is_contiguous(memory_format=torch.channels_last)))
        return net(x)

    LayerScoreCam(forward, net.features).attribute(images[:2], target=0, perturbations_per_eval=2)
    assert len(seen) == 1
    # Channels last where convolutions gain by it.
    assert next(iter(seen))[1] == (images.device.type == "cpu")


@pytest.mark.parametrize("algorithm", MASKED)
def test_the_number_of_masks_per_evaluation_changes_nothing(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    expected = algorithm(net, net.features).attribute(images, target=2)
    for number in (1, 2, 100):
        counter = Counter(net)
        ours = algorithm(counter, net.features).attribute(images, target=2, perturbations_per_eval=number)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        assert max(counter.sizes) <= number * len(images)


@pytest.mark.parametrize("subject", [*FEW_MASKED, confidence_drop, insertion])
def test_an_output_whose_memory_is_used_again(subject: Any, net: SmallNet, images: Tensor) -> None:
    memory = torch.empty(64, 3, device=images.device)

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return net(x)
        return memory[: len(x)].copy_(net(x))

    options: dict[str, Any] = {"target": 1, "perturbations_per_eval": 1, "activation": None}
    assert torch.equal(
        run(subject, forward, net.features, images, **options), run(subject, net, net.features, images, **options)
    )


class ModelOutput(OrderedDict[str, Any]):
    """As the transformers package returns its outputs."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


@pytest.mark.parametrize("algorithm", KINDS)
def test_a_forward_function_that_returns_a_dictionary(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    for output in (dict, ModelOutput):
        with pytest.raises(TypeError, match=r"logits"):
            algorithm(lambda x, output=output: output(logits=net(x)), net.features).attribute(images, target=1)
    expected = algorithm(net, net.features).attribute(images, target=1)
    ours = algorithm(lambda x: ModelOutput(logits=net(x)).logits, net.features).attribute(images, target=1)
    torch.testing.assert_close(ours, expected)


class Quantized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.quantize_per_tensor(x.detach(), 0.01, 0, torch.qint8)


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x)


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@pytest.mark.parametrize(
    ("layer", "back", "message"),
    [(Quantized(), Tensor.dequantize, "(?i)quantized|qint8"), (Fourier(), Tensor.abs, "(?i)complex")],
    ids=["quantized", "complex"],
)
def test_a_layer_whose_values_cannot_be_maps(layer: nn.Module, back: Any, message: str, images: Tensor) -> None:
    for algorithm in KINDS:
        counter = Counter(lambda x: back(layer(x)).mean((2, 3)))
        with pytest.raises((TypeError, ValueError), match=message):
            algorithm(counter, layer).attribute(images, target=1)
        assert counter.rows <= len(images), "refused before any masked pass"


@pytest.mark.parametrize("algorithm", FEW_MASKED)
def test_a_model_with_a_fixed_batch_size(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    image = images[:1]
    # An error of torch for any other number of rows, and a single score for any number.
    for forward in (lambda x: net(x.view(image.shape)), lambda x: net(x)[:1]):
        with pytest.raises((RuntimeError, ValueError), match="perturbations_per_eval=1"):
            algorithm(forward, net.features).attribute(image, target=1)
    # One mask for each example in one call, down to the last one.
    for batch in (image, images):
        expected = algorithm(net, net.features).attribute(batch, target=1)
        fixed = algorithm(lambda x, batch=batch: net(x.view(batch.shape)), net.features)
        torch.testing.assert_close(fixed.attribute(batch, target=1, perturbations_per_eval=1), expected)


class BatchNormOfTheBatch(nn.Module):
    """Normalizes by the batch in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 64, 3)
        self.norm = nn.BatchNorm2d(64, track_running_stats=False)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x)).relu().mean((2, 3)))


class FunctionalDropout(BatchNormOfTheBatch):
    """Draws in evaluation mode as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.features(x).relu().mean((2, 3)), 0.5))


@pytest.mark.parametrize("model", [BatchNormOfTheBatch, FunctionalDropout])
@pytest.mark.parametrize(
    ("subject", "examples"), [(LayerScoreCam, 1), *product([*FEW_MASKED, confidence_drop, insertion], (3,))]
)
def test_scores_that_depend_on_the_batch_or_on_chance(
    subject: Any, model: type[nn.Module], examples: int, images: Tensor
) -> None:
    net = model().eval().to(images.device)
    with pytest.warns(UserWarning, match="(?i)batch|chance|random"):
        run(subject, net, net.features, images[:examples], target=1)


def test_small_probabilities_that_depend_on_the_batch(images: Tensor) -> None:
    net = BatchNormOfTheBatch().eval().to(images.device)
    with pytest.warns(UserWarning, match="in a batch with masked inputs"):
        insertion(lambda x: net(x) - 9 * x.new_tensor([0.0, 1.0, 0.0]), images, torch.rand(3, 1, 12, 10), target=1)


@pytest.mark.parametrize("subject", [*AT_INPUT_SIZE, insertion, deletion])
def test_a_softmax_that_saturates(subject: Any, net: SmallNet, images: Tensor) -> None:
    """The unmasked input, the blank and every mask score the same 0 or 1, so that the map says nothing."""
    for scale in (1e6, -1e6):
        # As Captum's wrapper for segmentation, which sums logits over many pixels.
        shift = scale * images.new_tensor([0.0, 1.0, 2.0])
        with pytest.warns(UserWarning, match="activation=None"):
            run(subject, lambda x, shift=shift: net(x) + shift, net.features, images, target=2)


def test_a_union_of_a_score_cam_that_is_negative_everywhere(images: Tensor) -> None:
    """Its R is zero, so that the map is zero unless D contributes: with two classes, D hurts one of them."""
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LogSigmoid())
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval().to(images.device)
    assert LayerScoreCam(model, features).attribute(images, target=0).lt(0).all()
    zero = 0
    for target in (0, 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attributions = LayerUnionCam(model, features).attribute(images, target=target)
        if (attributions.flatten(1).amax(1) == 0).any():
            zero += 1
            assert any(re.search("(?i)negative|Score-CAM|region", str(warning.message)) for warning in caught)
    assert zero


@pytest.mark.parametrize("algorithm", [LayerFusionCam, LayerUnionCam])
def test_a_wrapper_around_a_component_loses_no_argument(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    """A signature of ``*args, **kwargs`` does not tell whether it takes a target: it is given, or the call refused."""

    class Wrapper(LayerScoreCam):
        given: list[Any] = []  # noqa: RUF012

        def attribute(self, *args: Any, **kwargs: Any) -> Tensor:
            self.given.append(kwargs.get("target", args[1] if len(args) > 1 else None))
            return LayerScoreCam.attribute(self, *args, **kwargs)

    Wrapper.given.clear()

    def forward(x: Tensor) -> Tensor:
        return net(x)[:, 0]  # One score for each example, so that no target is right as well.

    attribution = algorithm(forward, net.features, region_method=Wrapper(forward, net.features), activation=None)
    attribution.attribute(images)
    attribution = algorithm(net, net.features, region_method=Wrapper(net, net.features))
    Wrapper.given.clear()
    try:
        ours = attribution.attribute(images, target=2)
    except (TypeError, ValueError) as refusal:
        assert "target" in str(refusal)  # noqa: PT017
        assert not Wrapper.given
        return
    assert Wrapper.given == [2]
    assert torch.equal(ours, algorithm(net, net.features).attribute(images, target=2))


@pytest.mark.parametrize("algorithm", FEW_MASKED)
def test_features_that_come_last_are_wrapped(algorithm: type[LayerAttribution]) -> None:
    """Inputs (N, T, E) of a model that transposes them: the masks run along the last axis, so that is T in a wrap."""
    convolution = nn.Conv1d(4, 6, 3, padding=1)
    head = nn.Linear(6, 3)

    def forward(x: Tensor) -> Tensor:
        return head(convolution(x.transpose(1, 2)).relu().mean(2))

    sequences = torch.rand(2, 9, 4)
    wrapped = algorithm(lambda x: forward(x.transpose(1, 2)), convolution)
    ours = wrapped.attribute(sequences.transpose(1, 2), target=1)
    straight = algorithm(lambda x: head(convolution(x).relu().mean(2)), convolution)
    torch.testing.assert_close(ours, straight.attribute(sequences.transpose(1, 2), target=1))
    assert ours.shape[2] == 9
