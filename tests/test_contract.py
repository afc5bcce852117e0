"""Captum's contract: its generated suites' checks, and its own functions run on our attributions."""

import copy
import pickle
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam, NoiseTunnel, PerturbationAttribution
from captum.metrics import infidelity, sensitivity_max
from captum.testing.attr.helpers.gen_test_utils import gen_test_name, get_target_layer, parse_test_config
from captum.testing.helpers.basic_models import (
    BasicModel_ConvNet,
    BasicModel_ConvNet_MaxPool1d,
    BasicModel_ConvNet_MaxPool3d,
)
from torch import Tensor, nn

from captum_fusion import LayerAblationCam, LayerFusionCam, LayerScoreCam, LayerXGradCam
from tests.conftest import SmallNet, on
from tests.methods import (
    FEW,
    LAYER_KINDS,
    METHODS,
    PATHS,
    FusedAttributions,
    Rise,
    accepted,
    at_input_size,
    has_input_shape,
    keeps_the_graph,
)

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
    # The random state of a test does not depend on which test made the configuration.
    with torch.random.fork_rng():
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


def generated(prefix: str, algorithms: dict[str, list[Any]]) -> pytest.MarkDecorator:
    """An item, with Captum's name, for each configuration and each of the algorithms that it is tested on."""
    cases = [
        pytest.param(algorithm, name, id=gen_test_name(prefix, name, algorithm, False))
        for name in algorithms
        for algorithm in algorithms[name]
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


def astuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_no_hooks(model: nn.Module) -> None:
    for part in model.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._backward_hooks


# Every method once, every path with several inputs, and every form of the target and number of axes by three methods.
@generated(
    "test_target",
    {name: [LayerXGradCam, LayerAblationCam, LayerFusionCam] for name in CONFIGURATIONS}
    | {"list": [method for method in METHODS if method not in PATHS], "multiple_inputs": PATHS},
)
def test_batched_equals_one_by_one(algorithm: Any, configured: tuple[nn.Module, str, dict[str, Any]]) -> None:
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
    assert_no_hooks(model)


@generated("test_data_parallel", {"multiple_inputs": LAYER_KINDS})
def test_data_parallel(algorithm: Any, configured: tuple[nn.Module, str, dict[str, Any]]) -> None:
    model, layer, arguments = configured
    module = get_target_layer(model, layer)
    arguments = accepted(algorithm(model, module), arguments)
    expected = algorithm(model, module).attribute(**arguments)
    parallel = nn.DataParallel(model)
    for attribution in (algorithm(parallel, module), algorithm(parallel.forward, module, device_ids=[0])):
        for ours, theirs in zip(astuple(attribution.attribute(**arguments)), astuple(expected), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("algorithm", [LayerXGradCam, LayerScoreCam, LayerAblationCam])
def test_scripted_and_traced_parts_of_the_forward_function(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head).eval()
    expected = algorithm(net, net.features).attribute(images, target=1)
    for compiled in (torch.jit.script(tail), torch.jit.trace(tail, images.new_ones(2, 6, 6, 5))):

        def forward(x: Tensor, compiled: Any = compiled) -> Tensor:
            return compiled(net.features(net.stem(x)))

        torch.testing.assert_close(algorithm(forward, net.features).attribute(images, target=1), expected)


@pytest.mark.parametrize("algorithm", LAYER_KINDS)
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


@pytest.mark.parametrize("algorithm", LAYER_KINDS)
def test_a_container_and_an_in_place_layer(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    # The ReLU works in place on the output of features; the container's output is that of the ReLU.
    before = algorithm(net, net.features).attribute(images, target=0)
    container = nn.Sequential(net.stem, net.features)
    model = nn.Sequential(container, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head)
    torch.testing.assert_close(algorithm(model, container).attribute(images, target=0), before)


@pytest.mark.parametrize("algorithm", PATHS)
def test_gradient_requirements_do_not_matter(algorithm: Any, net: SmallNet, images: Tensor) -> None:
    expected = algorithm(net, net.features).attribute(images, target=0)
    with torch.no_grad():
        assert torch.equal(algorithm(net, net.features).attribute(images, target=0), expected)
    assert torch.equal(algorithm(net, net.features).attribute(images.clone().requires_grad_(), target=0), expected)
    net.requires_grad_(False)
    ours = algorithm(net, net.features).attribute(images, target=0)
    assert torch.equal(ours, expected)
    # Only what has a graph, as LayerGradCam's has, requires gradients; in a tunnel, too.
    captums = LayerGradCam(net, net.features).attribute(images, target=0)
    attribution = algorithm(net, net.features)
    method = type(getattr(attribution, "attribution_method", attribution))
    assert ours.requires_grad == (keeps_the_graph(method) and captums.requires_grad)


class PictureAndTable(nn.Module):
    """A table and a picture, of which only the picture has spatial axes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 + 5, 3)

    def forward(self, table: Tensor, picture: Tensor, *_: Tensor) -> Tensor:
        return self.head(torch.cat([self.features(picture).relu().mean((2, 3)), table], 1))


def perturb(inputs: Any) -> tuple[Any, Any]:
    if isinstance(inputs, Tensor):
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise
    return tuple(zip(*map(perturb, inputs), strict=True))


@pytest.mark.parametrize("algorithm", PATHS)
def test_captums_functions_take_our_attributions(algorithm: Any, net: SmallNet, images: Tensor) -> None:
    attribution = algorithm(net, net.features)
    plain = attribution.attribute(images, target=[0, 1, 2])
    noisy = NoiseTunnel(attribution).attribute(images, nt_samples=2, stdevs=0.1, target=[0, 1, 2])
    assert noisy.shape == plain.shape
    assert noisy.isfinite().all()
    still = NoiseTunnel(attribution).attribute(images, nt_samples=2, stdevs=0.0, target=[0, 1, 2])
    torch.testing.assert_close(still, plain, atol=1e-5, rtol=1e-5)

    assert infidelity(net, perturb, images, at_input_size(plain, images), target=0).shape == (3,)

    # Captum's metric calls its function with a tuple of inputs and takes one map for each, so that a layer's map, also
    # that of LayerGradCam, has to be put into a tuple.
    def explain(inputs: tuple[Tensor, ...], target: int) -> tuple[Tensor, ...]:
        return (attribution.attribute(inputs, target=target),)

    function = attribution.attribute if has_input_shape(algorithm) else explain
    sensitivity = sensitivity_max(function, images, n_perturb_samples=2, target=0)
    assert sensitivity.shape == (3,)
    assert sensitivity.isfinite().all()


@pytest.mark.parametrize("algorithm", FEW)
def test_captums_functions_take_tuples(algorithm: Any, images: Tensor) -> None:
    inputs = (torch.rand(3, 5).to(images.device), images)
    net = PictureAndTable().to(images.device)
    attribution = algorithm(net, net.features)
    plain = attribution.attribute(inputs, target=1)
    still = NoiseTunnel(attribution).attribute(inputs, nt_samples=2, stdevs=0.0, target=1)
    if has_input_shape(algorithm):
        smoothed = NoiseTunnel(attribution).attribute(inputs, nt_samples=2, stdevs=0.1, target=1)
        assert [value.shape for value in smoothed] == [value.shape for value in inputs]
        torch.testing.assert_close(still[1], plain[1], atol=1e-5, rtol=1e-5)
        assert not smoothed[0].any()
    else:
        torch.testing.assert_close(still, plain, atol=1e-5, rtol=1e-5)
        plain = (torch.zeros_like(inputs[0]), at_input_size(plain, images))
    assert infidelity(net, perturb, inputs, plain, target=1).shape == (3,)

    def explain(inputs: tuple[Tensor, ...], **arguments: Any) -> tuple[Tensor, ...]:
        return astuple(attribution.attribute(inputs, **arguments))

    sensitivity = sensitivity_max(explain, inputs, n_perturb_samples=2, target=1)
    assert sensitivity.shape == (3,)
    assert sensitivity.isfinite().all()


@pytest.mark.parametrize("algorithm", [LayerFusionCam, Rise, FusedAttributions])
def test_an_input_that_is_not_masked_gets_zeros(algorithm: Any, images: Tensor) -> None:
    inputs = (torch.rand(3, 5).to(images.device), images, torch.tensor([3, 1, 4]).to(images.device))
    net = PictureAndTable().to(images.device)
    table, picture, numbers = algorithm(net, net.features).attribute(inputs, target=1)
    assert table.shape == inputs[0].shape
    assert not table.any()
    assert picture.shape == inputs[1].shape
    assert picture.any()
    assert numbers.shape == inputs[2].shape
    assert not numbers.any()


@pytest.mark.parametrize("algorithm", METHODS)
def test_properties_and_shape_are_those_of_captums_classes(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    attribution = algorithm(net, net.features)
    assert isinstance(attribution, LayerAttribution)
    assert attribution.forward_func is net
    assert attribution.layer is net.features
    assert attribution.device_ids is None
    # As Captum names its own: LayerGradCam is "Layer Grad Cam".
    assert attribution.get_name() == re.sub(r"(?<!^)(?=[A-Z])", " ", algorithm.__name__)
    assert not attribution.has_convergence_delta()
    # As for Captum's other perturbation methods and its own CAM.
    assert attribution.multiplies_by_inputs == issubclass(algorithm, PerturbationAttribution)
    attributions = attribution.attribute(images, target=0)
    if has_input_shape(algorithm):
        assert attributions.shape == images.shape
        assert torch.equal(attributions, attributions[:, :1].expand_as(attributions))
    else:
        assert attributions.shape == LayerGradCam(net, net.features).attribute(images, target=0).shape
    assert attributions.dtype == torch.float32
    assert attributions.device == images.device
    # The layer's input is the output of the layer before.
    to_input = attribution.attribute(images, target=0, attribute_to_layer_input=True)
    torch.testing.assert_close(to_input, algorithm(net, net.stem).attribute(images, target=0))


@pytest.mark.parametrize("algorithm", FEW)
def test_copies_are_independent_and_equal(algorithm: Any, net: SmallNet, images: Tensor) -> None:
    attribution = algorithm(net, net.features)
    expected = attribution.attribute(images, target=0)
    for copied in (copy.deepcopy(attribution), pickle.loads(pickle.dumps(attribution))):
        assert copied.forward_func is not net
        assert torch.equal(copied.attribute(images, target=0), expected)
        with torch.no_grad():
            copied.forward_func.head.weight.zero_()
        assert torch.equal(attribution.attribute(images, target=0), expected)
