"""Captum's contract: its generated suites' checks, and its own functions run on our attributions."""

import copy
import pickle
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch
from captum.attr import Attribution, LayerAttribution, LayerGradCam, NoiseTunnel, PerturbationAttribution, visualization
from captum.metrics import infidelity, sensitivity_max
from captum.testing.attr.helpers.gen_test_utils import gen_test_name, get_target_layer, parse_test_config
from captum.testing.helpers.basic_models import (
    BasicModel_ConvNet,
    BasicModel_ConvNet_MaxPool1d,
    BasicModel_ConvNet_MaxPool3d,
)
from matplotlib.figure import Figure
from torch import Tensor, nn

from tests.conftest import SmallNet, on
from tests.methods import METHODS, accepted, at_input_size, has_input_shape, keeps_the_graph

pytestmark = pytest.mark.every_device


class SegmentationNet(nn.Module):
    """An output with more dimensions: (N, classes, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu())


class TwoInputNet(nn.Module):
    """Masks both images, passes the table through, and scales by an additional argument per example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4 + 2, 3)

    def forward(self, first: Tensor, second: Tensor, table: Tensor, scale: Tensor, power: int) -> Tensor:
        pooled = self.conv1(first + second).relu().mean((2, 3))
        return self.head(torch.cat([pooled, table], 1)) * scale.view(-1, 1) ** power


PIXELS = [(0, 1, 2), (1, 3, 3), (4, 0, 9), (2, 5, 5)]
# The network, its layer, the shape of its input and the target, for each of Captum's target forms and kinds of inputs.
CONFIGURATIONS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...], Any]] = {
    "int": (BasicModel_ConvNet, "conv2", (4, 1, 10, 10), 1),
    "one_element_tensor": (BasicModel_ConvNet, "conv1", (4, 1, 10, 10), torch.tensor(3)),
    "list": (BasicModel_ConvNet, "relu2", (4, 1, 10, 10), [0, 3, 9, 1]),
    "tensor": (BasicModel_ConvNet, "relu1", (4, 1, 10, 10), torch.tensor([0, 3, 9, 1])),
    "tuple": (SegmentationNet, "conv1", (4, 1, 10, 10), (1, 4, 5)),
    "list_of_tuples": (SegmentationNet, "conv1", (4, 1, 10, 10), PIXELS),
    "signal": (BasicModel_ConvNet_MaxPool1d, "conv1", (4, 1, 10), [0, 1, 2, 3]),
    "volume": (BasicModel_ConvNet_MaxPool3d, "conv1", (4, 1, 10, 10, 10), [0, 1, 2, 3]),
    "multiple_inputs": (TwoInputNet, "conv1", (4, 1, 6, 8), [0, 1, 2, 0]),
}


@cache
def configuration(name: str) -> dict[str, Any]:
    """In the form of captum.testing.attr.helpers.test_config."""
    make, layer, shape, target = CONFIGURATIONS[name]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        # Captum's networks give all classes the same score, which leaves nothing but rounding to explain.
        nn.init.normal_(parameter)
    arguments = {"inputs": 3 * torch.randn(shape), "target": target}
    if name == "multiple_inputs":
        arguments["inputs"] = (torch.randn(shape), torch.randn(shape), torch.randn(4, 2))
        arguments["additional_forward_args"] = (torch.rand(4) + 0.5, 2)
        arguments["baselines"] = (0.5, torch.randn(shape), 0)
    return {"name": name, "algorithms": METHODS, "model": model, "layer": layer, "attribute_args": arguments}


@pytest.fixture
def configured(request: pytest.FixtureRequest, device: torch.device) -> tuple[nn.Module, str, dict[str, Any]]:
    """The network, the name of its layer and the arguments, which Captum's own function takes apart."""
    _, model, arguments, layer, _, _ = parse_test_config(configuration(request.param))
    return copy.deepcopy(model).to(device), layer, on(device, arguments)


def generated(prefix: str, names: Iterable[str] = CONFIGURATIONS) -> pytest.MarkDecorator:
    cases = [
        pytest.param(algorithm, name, id=gen_test_name(prefix, name, algorithm, False))
        for name in names
        for algorithm in METHODS
    ]
    return pytest.mark.parametrize(("algorithm", "configured"), cases, indirect=["configured"])


def row(value: Any, example: int) -> Any:
    """One example's share of an argument, as Captum's target suite takes it."""
    if isinstance(value, tuple):
        return tuple(row(part, example) for part in value)
    if isinstance(value, Tensor):
        return value[example : example + 1] if value.dim() and len(value) > 1 else value
    return value


def double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(double(part) for part in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@generated("test_target")
def test_batched_equals_one_by_one(
    algorithm: type[LayerAttribution], configured: tuple[nn.Module, str, dict[str, Any]]
) -> None:
    # In double precision and without denoising, where rounding decides which of several equal values are kept.
    model, layer, arguments = configured
    model = model.double()
    arguments = {name: double(value) for name, value in arguments.items()}
    attribution = algorithm(model, get_target_layer(model, layer))
    arguments = accepted(attribution, arguments | {"percentile": 0.0})
    batched = attribution.attribute(**arguments)
    for example in range(4):
        single = {name: row(value, example) for name, value in arguments.items() if name != "target"}
        target = arguments["target"]
        if isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1):
            target = target[example]
        alone = attribution.attribute(**single, target=target)
        for ours, theirs in zip(astuple(alone), astuple(batched), strict=True):
            torch.testing.assert_close(ours, theirs[example : example + 1], rtol=1e-5, atol=1e-5)


def astuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


class Broken(nn.Module):
    def forward(self, *_: object) -> Tensor:
        raise RuntimeError("broken layer")


@generated("test_hook_removal", ["int", "multiple_inputs"])
@pytest.mark.parametrize("failure", [None, "target", "layer"])
def test_no_hook_remains(
    algorithm: type[LayerAttribution],
    configured: tuple[nn.Module, str, dict[str, Any]],
    failure: str | None,
) -> None:
    model, layer, arguments = configured
    if failure == "layer":
        setattr(model, layer, Broken())
    module = get_target_layer(model, layer)
    if failure == "target":
        arguments = arguments | {"target": 100}
    attribution = algorithm(model, module)
    arguments = accepted(attribution, arguments)
    if failure is None:
        attribution.attribute(**arguments)
    else:
        with pytest.raises((ValueError, RuntimeError), match=r"target 100|broken layer"):
            attribution.attribute(**arguments)
    for part in model.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._backward_hooks


@generated("test_data_parallel", ["int", "signal", "multiple_inputs"])
def test_data_parallel(algorithm: type[LayerAttribution], configured: tuple[nn.Module, str, dict[str, Any]]) -> None:
    model, layer, arguments = configured
    module = get_target_layer(model, layer)
    arguments = accepted(algorithm(model, module), arguments)
    expected = algorithm(model, module).attribute(**arguments)
    parallel = nn.DataParallel(model)
    for attribution in (algorithm(parallel, module), algorithm(parallel.forward, module, device_ids=[0])):
        for ours, theirs in zip(astuple(attribution.attribute(**arguments)), astuple(expected), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("algorithm", METHODS)
@pytest.mark.parametrize("compile_", [lambda tail, _: torch.jit.script(tail), torch.jit.trace], ids=["script", "trace"])
def test_scripted_and_traced_parts_of_the_forward_function(
    algorithm: type[LayerAttribution], compile_: Any, net: SmallNet, images: Tensor
) -> None:
    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head).eval()
    tail = compile_(tail, images.new_ones(2, 6, 6, 5))
    expected = algorithm(net, net.features).attribute(images, target=1)
    ours = algorithm(lambda x: tail(net.features(net.stem(x))), net.features).attribute(images, target=1)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("algorithm", METHODS)
def test_a_module_used_twice_is_explained_by_its_last_run(algorithm: type[LayerAttribution], images: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self, last: nn.Module | None = None) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.act = nn.ReLU()
            self.last = last or self.act
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.last(self.conv(self.act(self.conv(x)))).mean((2, 3)))

    twice = Net().to(images.device)
    once = Net(nn.ReLU()).to(images.device)
    once.load_state_dict(twice.state_dict())
    ours = algorithm(twice, twice.act).attribute(images, target=0)
    torch.testing.assert_close(ours, algorithm(once, once.last).attribute(images, target=0))


@pytest.mark.parametrize("algorithm", METHODS)
def test_a_container_and_an_in_place_layer(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    # The ReLU works in place on the output of features; the container's output is that of the ReLU.
    before = algorithm(net, net.features).attribute(images, target=0)
    container = nn.Sequential(net.stem, net.features)
    model = nn.Sequential(container, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head)
    torch.testing.assert_close(algorithm(model, container).attribute(images, target=0), before)


@pytest.mark.parametrize("algorithm", METHODS)
def test_gradient_requirements_do_not_matter(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    expected = algorithm(net, net.features).attribute(images, target=0)
    with torch.no_grad():
        assert torch.equal(algorithm(net, net.features).attribute(images, target=0), expected)
    assert torch.equal(algorithm(net, net.features).attribute(images.clone().requires_grad_(), target=0), expected)
    net.requires_grad_(False)
    ours = algorithm(net, net.features).attribute(images, target=0)
    assert torch.equal(ours, expected)
    # Only what has a graph, as LayerGradCam's has, requires gradients.
    captums = LayerGradCam(net, net.features).attribute(images, target=0)
    assert ours.requires_grad == (keeps_the_graph(algorithm) and captums.requires_grad)


@pytest.mark.parametrize("algorithm", METHODS)
@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor, nt_type: str) -> None:
    attribution = algorithm(net, net.features)
    settings = {"nt_type": nt_type, "nt_samples": 2, "stdevs": 0.1, "target": [0, 1, 2]}
    smoothed = NoiseTunnel(attribution).attribute(images, **settings)
    plain = attribution.attribute(images, target=[0, 1, 2])
    assert smoothed.shape == plain.shape
    assert smoothed.isfinite().all()
    without_noise = NoiseTunnel(attribution).attribute(images, **settings | {"stdevs": 0.0, "nt_type": "smoothgrad"})
    torch.testing.assert_close(without_noise, plain, atol=1e-5, rtol=1e-5)


def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
    noise = 0.1 * torch.randn_like(inputs)
    return noise, inputs - noise


@pytest.mark.parametrize("algorithm", METHODS)
def test_infidelity_and_sensitivity(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    attribution = algorithm(net, net.features)
    attributions = attribution.attribute(images, target=0)
    assert infidelity(net, perturb, images, at_input_size(attributions, images), target=0).shape == (3,)

    # Captum's metric calls its function with a tuple of inputs and takes one map for each, so that a layer's map, also
    # that of LayerGradCam, has to be put into a tuple.
    def explain(inputs: tuple[Tensor, ...], target: int) -> tuple[Tensor, ...]:
        return (attribution.attribute(inputs, target),)

    sensitivity = sensitivity_max(
        attribution.attribute if has_input_shape(algorithm) else explain, images, n_perturb_samples=2, target=0
    )
    assert sensitivity.shape == (3,)
    assert sensitivity.isfinite().all()


@pytest.mark.parametrize("algorithm", METHODS)
def test_visualization(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    attribution = at_input_size(algorithm(net, net.features).attribute(images[:1], target=0), images[:1])
    image, values = (part[0].detach().cpu().permute(1, 2, 0).numpy() for part in (images, attribution))
    figure = Figure()
    for axis, method in zip(figure.subplots(1, 3), ("heat_map", "blended_heat_map", "masked_image"), strict=True):
        visualization.visualize_image_attr(
            values, image, method, sign="positive", plt_fig_axis=(figure, axis), use_pyplot=False
        )
        assert axis.images
    drawn, axes = visualization.visualize_image_attr_multiple(
        values, image, ["original_image", "heat_map"], ["all", "positive"], use_pyplot=False
    )
    assert len(axes) == 2
    assert len(drawn.axes) >= 2


@pytest.mark.parametrize("algorithm", METHODS)
def test_attribution_properties(algorithm: type[LayerAttribution], net: SmallNet) -> None:
    attribution = algorithm(net, net.features)
    assert isinstance(attribution, Attribution)
    assert isinstance(attribution, LayerAttribution)
    assert attribution.forward_func is net
    assert attribution.layer is net.features
    assert attribution.device_ids is None
    # As Captum names its own: LayerGradCam is "Layer Grad Cam".
    assert attribution.get_name() == re.sub(r"(?<!^)(?=[A-Z])", " ", algorithm.__name__)
    assert not attribution.has_convergence_delta()
    # As for Captum's other perturbation methods and its own CAM.
    assert attribution.multiplies_by_inputs == issubclass(algorithm, PerturbationAttribution)
    assert not LayerGradCam(net, net.features).multiplies_by_inputs


@pytest.mark.parametrize("algorithm", METHODS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_are_independent_and_equal(
    algorithm: type[LayerAttribution], duplicate: Any, net: SmallNet, images: Tensor
) -> None:
    attribution = algorithm(net, net.features)
    copied = duplicate(attribution)
    assert copied.forward_func is not net
    expected = attribution.attribute(images, target=0)
    assert torch.equal(copied.attribute(images, target=0), expected)
    with torch.no_grad():
        copied.forward_func.head.weight.zero_()
    assert torch.equal(attribution.attribute(images, target=0), expected)


@pytest.mark.parametrize("algorithm", METHODS)
def test_the_layers_input_is_the_output_of_the_layer_before(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    to_input = algorithm(net, net.features).attribute(images, target=0, attribute_to_layer_input=True)
    torch.testing.assert_close(to_input, algorithm(net, net.stem).attribute(images, target=0))


@pytest.mark.parametrize("algorithm", METHODS)
def test_the_shape_is_the_inputs_or_that_of_grad_cam(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    attributions = algorithm(net, net.features).attribute(images, target=0)
    if has_input_shape(algorithm):
        assert attributions.shape == images.shape
        assert torch.equal(attributions, attributions[:, :1].expand_as(attributions))
    else:
        assert attributions.shape == LayerGradCam(net, net.features).attribute(images, target=0).shape
    assert attributions.dtype == torch.float32
    assert attributions.device == images.device


@pytest.mark.parametrize("algorithm", METHODS)
def test_inference_mode_is_refused_where_gradients_are_needed(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    attribution = algorithm(net, net.features)
    expected = attribution.attribute(images, target=0)
    with torch.inference_mode():
        if issubclass(algorithm, PerturbationAttribution):
            assert torch.equal(attribution.attribute(images, target=0), expected)
        else:
            with pytest.raises(RuntimeError, match=f"{algorithm.__name__} needs gradients.*no_grad"):
                attribution.attribute(images, target=0)
