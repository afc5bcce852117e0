"""What a user of Captum types means the same: the arguments, their order, and what comes back for them."""

from inspect import Parameter, signature
from typing import Any

import pytest
import torch
from captum.attr import GuidedGradCam, LayerAttribution, LayerGradCam, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from captum.robust import FGSM, PGD
from torch import Tensor, nn

from captum_fusion import LayerFusionCam, LayerGroupCam, LayerScoreCam, LayerUnionCam
from captum_fusion.metrics import confidence_drop, confidence_increase, deletion, insertion
from tests.conftest import SmallNet
from tests.methods import METHODS, at_input_size, has_input_shape, keeps_the_graph, takes

pytestmark = pytest.mark.every_device

METRICS = [confidence_drop, confidence_increase, insertion, deletion]
GRAPH_KEEPING = [method for method in METHODS if takes(method, "grad_kwargs")]
MASKED = [method for method in METHODS if takes(method, "baselines")]


def positional(method: Any) -> list[Parameter]:
    parameters = list(signature(method).parameters.values())[1:]
    return [parameter for parameter in parameters if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("algorithm", METHODS)
def test_the_positional_arguments_are_those_of_captums_class(algorithm: type[LayerAttribution]) -> None:
    model = GuidedGradCam if has_input_shape(algorithm) else LayerGradCam
    ours, theirs = positional(algorithm.attribute), positional(model.attribute)
    # A method without gradients has no use for grad_kwargs, the last one.
    assert len(ours) >= len(theirs) - (not keeps_the_graph(algorithm) and model is LayerGradCam)
    for mine, captums in zip(ours, theirs, strict=False):
        assert mine.name == captums.name
        assert mine.default == ("bilinear" if mine.name == "interpolate_mode" else captums.default)
    assert len(ours) <= len(theirs)
    others = [parameter for parameter in signature(algorithm.attribute).parameters.values() if parameter not in ours]
    assert {parameter.kind for parameter in others if parameter.name != "self"} <= {Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("algorithm", METHODS)
def test_the_fourth_argument_is_never_a_baseline(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    attribution = algorithm(net, net.features)
    if has_input_shape(algorithm):  # interpolate_mode
        for mode in (True, 0.5, 1, "cubic spline"):
            with pytest.raises((TypeError, ValueError), match="interpolate_mode"):
                attribution.attribute(images, 1, None, mode)
        return
    expected = attribution.attribute(images, target=1, attribute_to_layer_input=True)
    assert torch.equal(attribution.attribute(images, 1, None, True), expected)
    rectified = attribution.attribute(images, target=1, attribute_to_layer_input=True, relu_attributions=True)
    assert torch.equal(attribution.attribute(images, 1, None, True, True), rectified)


@pytest.mark.parametrize("algorithm", [method for method in METHODS if takes(method, "interpolate_mode")])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_bilinear_means_the_linear_family(algorithm: type[LayerAttribution], axes: int) -> None:
    net = SmallNet(axes).eval()
    inputs = torch.rand(2, 3, *(9, 8, 7)[:axes])
    default = algorithm(net, net.features).attribute(inputs, 1)
    assert torch.equal(algorithm(net, net.features).attribute(inputs, 1, None, "bilinear"), default)
    assert default.shape == inputs.shape


@pytest.mark.parametrize("algorithm", [method for method in METHODS if takes(method, "interpolate_mode")])
def test_nearest_gives_the_pixels_of_the_layer(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    # The layer's map is half as large as the image: each of its pixels covers two by two of the image's.
    attributions = algorithm(net, net.features).attribute(images, 1, None, "nearest")
    blocks = attributions.unfold(2, 2, 2).unfold(3, 2, 2)
    torch.testing.assert_close(blocks, blocks[..., :1, :1].expand_as(blocks))


@pytest.mark.parametrize("baseline", [True, False, (True,)])
@pytest.mark.parametrize("algorithm", MASKED)
def test_a_bool_is_no_baseline(
    algorithm: type[LayerAttribution], baseline: object, net: SmallNet, images: Tensor
) -> None:
    with pytest.raises(TypeError, match=r"baseline.*(True|False|bool)"):
        algorithm(net, net.features).attribute(images, target=1, baselines=baseline)


@pytest.mark.parametrize("metric", METRICS)
def test_a_bool_is_no_baseline_of_a_metric(metric: Any, net: SmallNet, images: Tensor) -> None:
    with pytest.raises(TypeError, match=r"baseline.*(True|bool)"):
        metric(net, images, images, baselines=True, target=1)


@pytest.mark.parametrize("algorithm", [method for method in METHODS if takes(method, "attr_dim_summation")])
def test_without_summation_each_channel_is_its_share(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    attribution = algorithm(net, net.features)
    channels = attribution.attribute(images, target=0, attr_dim_summation=False)
    assert channels.shape == LayerGradCam(net, net.features).attribute(images, 0, attr_dim_summation=False).shape
    torch.testing.assert_close(channels.sum(dim=1, keepdim=True), attribution.attribute(images, target=0))
    rectified = attribution.attribute(images, target=0, attr_dim_summation=False, relu_attributions=True)
    assert torch.equal(rectified, channels.relu())


@pytest.mark.parametrize("algorithm", GRAPH_KEEPING)
def test_grad_kwargs_reach_the_gradient(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    attribution = algorithm(net, net.features)
    with pytest.raises(TypeError, match="no_such_option"):
        attribution.attribute(images, 0, grad_kwargs={"no_such_option": True})
    ours = attribution.attribute(images, 0, grad_kwargs={"retain_graph": True})
    assert torch.equal(ours, attribution.attribute(images, 0))


class CurvedNet(nn.Module):
    """Its gradients depend on its input, and it is the same for any number of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).sigmoid().square().mean((2, 3)))


@pytest.mark.parametrize("algorithm", GRAPH_KEEPING)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_the_graph_is_kept_where_captums_grad_cam_keeps_it(
    algorithm: type[LayerAttribution], requires_grad: bool, trainable: bool, images: Tensor
) -> None:
    net = CurvedNet().to(images.device).requires_grad_(trainable)
    images.requires_grad_(requires_grad)
    captums = LayerGradCam(net, net.features).attribute(images, 1)
    ours = algorithm(net, net.features).attribute(images, 1)
    assert ours.requires_grad == captums.requires_grad
    assert images.requires_grad == requires_grad
    if requires_grad:
        for map_ in (captums, ours):
            (gradient,) = torch.autograd.grad(map_.square().sum(), images)
            assert gradient.isfinite().all()
            assert gradient.any()


@pytest.mark.parametrize("algorithm", GRAPH_KEEPING)
def test_the_gradient_of_a_map_whose_gradients_have_a_graph(algorithm: type[LayerAttribution]) -> None:
    # Against central differences, in double precision; only with create_graph are the weights differentiated as well.
    net = CurvedNet().double()
    x = torch.rand(1, 3, 4, 4, dtype=torch.double, requires_grad=True)
    attribution = algorithm(net, net.features)

    def total(inputs: Tensor) -> Tensor:
        return attribution.attribute(inputs, 1, grad_kwargs={"create_graph": True}).square().sum()

    assert torch.autograd.gradcheck(total, (x,))


@pytest.mark.parametrize("algorithm", GRAPH_KEEPING)
def test_captums_attacks_run_through_a_map(algorithm: type[LayerAttribution], images: Tensor) -> None:
    net = CurvedNet().to(images.device)
    attribution = algorithm(net, net.features)

    def loss(inputs: Tensor) -> Tensor:
        # Captum's FGSM takes gradients below 1e-6 for zero.
        # With its weights differentiated as well: otherwise a step along the gradient may lower it.
        maps = attribution.attribute(inputs, target=1, grad_kwargs={"create_graph": True})
        return 1e6 * maps.square().flatten(1).sum(dim=1, keepdim=True)

    def of_outputs(outputs: Tensor, _: object) -> Tensor:
        return outputs.sum(dim=1)

    moved = FGSM(loss, of_outputs).perturb(images, epsilon=0.01, target=0)
    (gradient,) = torch.autograd.grad(loss(images.requires_grad_()).sum(), images)
    images = images.detach()
    # The attack leaves pixels alone whose gradient is below 1e-6.
    step = 0.01 * torch.where(gradient.abs() > 1e-6, gradient.sign(), 0)
    torch.testing.assert_close(moved, images + step)
    assert step.any()
    assert loss(moved).gt(loss(images)).all()
    moved = PGD(loss, of_outputs).perturb(images, radius=0.02, step_size=0.01, step_num=3, target=0)
    assert (moved - images).abs().max() <= 0.02 + 1e-6
    assert loss(moved).gt(loss(images)).all()


@pytest.mark.parametrize("algorithm", METHODS)
def test_layer_and_forward_function_can_be_assigned(algorithm: type[LayerAttribution], images: Tensor) -> None:
    first, second = (net.eval().to(images.device) for net in (SmallNet(), SmallNet(channels=5)))
    expected = {
        (net, layer): algorithm(net, net.get_submodule(layer)).attribute(images, target=1)
        for net in (first, second)
        for layer in ("stem", "features")
    }
    attribution = algorithm(first, None)
    for net, layer in expected:
        attribution.forward_func = net
        attribution.layer = net.get_submodule(layer)
        assert torch.equal(attribution.attribute(images, target=1), expected[net, layer])


@pytest.mark.parametrize("algorithm", METHODS)
def test_a_method_without_a_layer_asks_for_one(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    with pytest.raises((TypeError, ValueError), match="layer"):
        algorithm(net, None).attribute(images, target=1)


def test_given_components_stay_where_they_are(net: SmallNet, images: Tensor) -> None:
    """Only the defaults follow an assigned layer."""
    grad_cam, score_cam = LayerGradCam(net, net.stem), LayerScoreCam(net, net.stem)
    fusion_cam = LayerFusionCam(net, net.stem, gradient_method=grad_cam)
    fusion_cam.layer = net.features
    expected = LayerFusionCam(net, net.features, gradient_method=grad_cam).attribute(images, target=1)
    assert torch.equal(fusion_cam.attribute(images, target=1), expected)
    assert not torch.equal(expected, LayerFusionCam(net, net.features).attribute(images, target=1))
    union_cam = LayerUnionCam(net, net.stem, region_method=score_cam)
    union_cam.layer = net.features
    expected = LayerUnionCam(net, net.features, region_method=score_cam).attribute(images, target=1)
    assert torch.equal(union_cam.attribute(images, target=1), expected)


class PictureAndTable(nn.Module):
    """A picture and a table, of which only the picture has spatial axes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 + 5, 3)

    def forward(self, table: Tensor, picture: Tensor) -> Tensor:
        return self.head(torch.cat([self.features(picture).relu().mean((2, 3)), table], 1))


@pytest.fixture
def table_and_picture(images: Tensor) -> tuple[Tensor, Tensor]:
    return torch.rand(3, 5, device=images.device), images


@pytest.mark.parametrize("algorithm", [method for method in METHODS if takes(method, "interpolate_mode")])
def test_an_input_that_is_not_masked_gets_zeros(
    algorithm: type[LayerAttribution], table_and_picture: tuple[Tensor, Tensor]
) -> None:
    net = PictureAndTable().to(table_and_picture[0].device)
    inputs = (*table_and_picture, table_and_picture[0].new_tensor([3, 1, 4], dtype=torch.long))
    table, picture, numbers = algorithm(lambda *given: net(*given[:2]), net.features).attribute(inputs, target=1)
    assert table.shape == inputs[0].shape
    assert not table.any()
    assert picture.shape == inputs[1].shape
    assert picture.any()
    assert numbers.shape == inputs[2].shape
    assert not numbers.any()


@pytest.mark.parametrize("algorithm", METHODS)
def test_captums_functions_take_tuples(
    algorithm: type[LayerAttribution], table_and_picture: tuple[Tensor, Tensor]
) -> None:
    net = PictureAndTable().to(table_and_picture[0].device)
    attribution = algorithm(net, net.features)
    plain = attribution.attribute(table_and_picture, target=1)
    settings = {"nt_samples": 2, "target": 1}
    smoothed = NoiseTunnel(attribution).attribute(table_and_picture, stdevs=0.1, **settings)
    still = NoiseTunnel(attribution).attribute(table_and_picture, stdevs=0.0, **settings)
    if has_input_shape(algorithm):
        assert [value.shape for value in smoothed] == [value.shape for value in table_and_picture]
        torch.testing.assert_close(still[1], plain[1], atol=1e-5, rtol=1e-5)
        assert not smoothed[0].any()
    else:
        torch.testing.assert_close(still, plain, atol=1e-5, rtol=1e-5)
        plain = (torch.zeros_like(table_and_picture[0]), at_input_size(plain, table_and_picture[1]))

    def perturb(inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        noise = tuple(0.1 * torch.randn_like(value) for value in inputs)
        return noise, tuple(value - part for value, part in zip(inputs, noise, strict=True))

    assert infidelity(net, perturb, table_and_picture, plain, target=1).shape == (3,)

    def explain(inputs: tuple[Tensor, ...], **arguments: Any) -> tuple[Tensor, ...]:
        attributions = attribution.attribute(inputs, **arguments)
        return attributions if isinstance(attributions, tuple) else (attributions,)

    sensitivity = sensitivity_max(explain, table_and_picture, n_perturb_samples=2, target=1)
    assert sensitivity.shape == (3,)
    assert sensitivity.isfinite().all()


@pytest.mark.parametrize(("channels", "groups"), [(6, 6), (40, 32)])
def test_group_cam_has_a_group_for_each_channel_of_a_small_layer(channels: int, groups: int, images: Tensor) -> None:
    net = SmallNet(channels=channels).eval().to(images.device)
    default = LayerGroupCam(net, net.features).attribute(images, target=0)
    assert torch.equal(default, LayerGroupCam(net, net.features, groups=groups).attribute(images, target=0))


@pytest.mark.parametrize("algorithm", [method for method in METHODS if takes(method, "interpolate_mode")])
def test_a_model_with_one_output_is_told_what_to_set(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    for forward in (lambda x: net(x)[:, :1], lambda x: net(x)[:, 0]):
        with pytest.raises(ValueError, match=r"sigmoid.*activation=None"):
            algorithm(forward, net.features).attribute(images)
        for activation in ("sigmoid", None):
            attributions = algorithm(forward, net.features, activation=activation).attribute(images)
            assert attributions.isfinite().all()
