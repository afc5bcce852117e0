"""Captum's contract: its generated suites' checks, and its own functions run on our attributions."""

import copy
import pickle
import re
from typing import Any

import numpy as np
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

from tests.conftest import SmallNet
from tests.methods import INPUT_SHAPED, LAYER_SHAPED, METHODS, accepted


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


def configurations() -> list[dict[str, Any]]:
    """In the form of captum.testing.attr.helpers.test_config."""
    torch.manual_seed(0)
    image, volume, signal = 3 * torch.randn(4, 1, 10, 10), 3 * torch.randn(4, 1, 10, 10, 10), 3 * torch.randn(4, 1, 10)
    pixels = [(0, 1, 2), (1, 3, 3), (4, 0, 9), (2, 5, 5)]
    multiple = (torch.randn(4, 1, 6, 8), torch.randn(4, 1, 6, 8), torch.randn(4, 2))
    scale = torch.rand(4) + 0.5
    entries: list[tuple[str, nn.Module, str, dict[str, Any]]] = [
        ("int", BasicModel_ConvNet(), "conv2", {"inputs": image, "target": 1}),
        ("one_element_tensor", BasicModel_ConvNet(), "conv1", {"inputs": image, "target": torch.tensor(3)}),
        ("list", BasicModel_ConvNet(), "relu2", {"inputs": image, "target": [0, 3, 9, 1]}),
        ("tensor", BasicModel_ConvNet(), "relu1", {"inputs": image, "target": torch.tensor([0, 3, 9, 1])}),
        ("tuple", SegmentationNet(), "conv1", {"inputs": image, "target": (1, 4, 5)}),
        ("list_of_tuples", SegmentationNet(), "conv1", {"inputs": image, "target": pixels}),
        ("signal", BasicModel_ConvNet_MaxPool1d(), "conv1", {"inputs": signal, "target": [0, 1, 2, 3]}),
        ("volume", BasicModel_ConvNet_MaxPool3d(), "conv1", {"inputs": volume, "target": [0, 1, 2, 3]}),
        (
            "multiple_inputs",
            TwoInputNet(),
            "conv1",
            {
                "inputs": multiple,
                "target": [0, 1, 2, 0],
                "additional_forward_args": (scale, 2),
                "baselines": (0.5, torch.randn(4, 1, 6, 8), 0),
            },
        ),
    ]
    for _, model, _, _ in entries:
        # Captum's networks give all classes the same score, which leaves nothing but rounding to explain.
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return [
        {"name": name, "algorithms": METHODS, "model": model.eval(), "layer": layer, "attribute_args": arguments}
        for name, model, layer, arguments in entries
    ]


def generated(prefix: str) -> pytest.MarkDecorator:
    cases = []
    for configuration in configurations():
        algorithms, model, arguments, layer, _, _ = parse_test_config(configuration)
        for algorithm in algorithms:
            name = gen_test_name(prefix, configuration["name"], algorithm, False)
            cases.append(pytest.param(algorithm, model, layer, arguments, id=name))
    return pytest.mark.parametrize(("algorithm", "model", "layer", "arguments"), cases)


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
    algorithm: type[LayerAttribution], model: nn.Module, layer: str, arguments: dict[str, Any]
) -> None:
    # In double precision and without denoising, where rounding decides which of several equal values are kept.
    model = copy.deepcopy(model).double()
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
            if theirs is not None:
                torch.testing.assert_close(ours, theirs[example : example + 1], rtol=1e-5, atol=1e-5)


def astuple(value: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return value if isinstance(value, tuple) else (value,)


class Broken(nn.Module):
    def forward(self, *_: object) -> Tensor:
        raise RuntimeError("broken layer")


@generated("test_hook_removal")
@pytest.mark.parametrize("failure", [None, "target", "layer"])
def test_no_hook_remains(
    algorithm: type[LayerAttribution],
    model: nn.Module,
    layer: str,
    arguments: dict[str, Any],
    failure: str | None,
) -> None:
    model = copy.deepcopy(model)
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


@generated("test_data_parallel")
def test_data_parallel(
    algorithm: type[LayerAttribution], model: nn.Module, layer: str, arguments: dict[str, Any]
) -> None:
    module = get_target_layer(model, layer)
    arguments = accepted(algorithm(model, module), arguments)
    expected = algorithm(model, module).attribute(**arguments)
    parallel = nn.DataParallel(model)
    for attribution in (algorithm(parallel, module), algorithm(parallel.forward, module, device_ids=[0])):
        for ours, theirs in zip(astuple(attribution.attribute(**arguments)), astuple(expected), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("algorithm", METHODS)
@pytest.mark.parametrize("compile_", [torch.jit.script, lambda tail: torch.jit.trace(tail, torch.rand(2, 6, 6, 5))])
def test_scripted_and_traced_parts_of_the_forward_function(
    algorithm: type[LayerAttribution], compile_: Any, net: SmallNet, images: Tensor
) -> None:
    tail = compile_(nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head).eval())
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

    twice = Net()
    once = Net(nn.ReLU())
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
    assert not ours.requires_grad


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
    if algorithm in LAYER_SHAPED:
        attributions = LayerAttribution.interpolate(attributions, images.shape[2:], "bilinear").expand_as(images)
    assert infidelity(net, perturb, images, attributions, target=0).shape == (3,)

    # Captum's metric calls its function with a tuple of inputs and takes one map for each, so that a layer's map, also
    # that of LayerGradCam, has to be put into a tuple.
    def explain(inputs: tuple[Tensor, ...], target: int) -> tuple[Tensor, ...]:
        return (attribution.attribute(inputs, target),)

    sensitivity = sensitivity_max(
        explain if algorithm in LAYER_SHAPED else attribution.attribute, images, n_perturb_samples=2, target=0
    )
    assert sensitivity.shape == (3,)
    assert sensitivity.isfinite().all()


@pytest.mark.parametrize("algorithm", INPUT_SHAPED)
def test_visualization(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    attribution = algorithm(net, net.features).attribute(images[:1], target=0)
    image, values = (np.transpose(part.squeeze().detach().numpy(), (1, 2, 0)) for part in (images[:1], attribution))
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
