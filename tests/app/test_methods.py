import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor

from captum_fusion import LayerFusionCam, LayerGroupCam, LayerScoreCam, LayerXGradCam
from captum_fusion._app.methods import CONTROLS, METHODS, Method, RememberedScoreCam, parse_method
from tests.conftest import SmallNet


def test_names() -> None:
    assert parse_method("grad-cam") == Method("grad-cam")
    assert parse_method("fusion-cam") == Method("fusion-cam", ("grad-cam", "score-cam"))
    assert parse_method("fusion-cam:raw") == Method("fusion-cam:raw", ("grad-cam", "score-cam"), "raw")
    fused = Method("fusion(x-grad-cam,group-cam):released", ("x-grad-cam", "group-cam"), "released")
    assert parse_method("fusion(x-grad-cam, group-cam):released") == fused
    assert parse_method("fusion-cam", "raw") == Method("fusion-cam", ("grad-cam", "score-cam"), "raw")
    assert parse_method("fusion-cam:raw", "released") == parse_method("fusion-cam:raw")


def test_what_a_method_is_made_of() -> None:
    assert parse_method("fusion(x-grad-cam,rise)").parts == ("x-grad-cam", "rise")
    assert parse_method("union-cam").parts == ("score-cam",)
    assert parse_method("score-cam").parts == ()


@pytest.mark.parametrize(
    ("loose", "name"),
    [
        ("Grad-CAM", "grad-cam"),
        ("gradcam", "grad-cam"),
        ("LayerGradCam", "grad-cam"),
        ("GradCAM++", "grad-cam++"),
        ("grad-cam-plus-plus", "grad-cam++"),
        ("LayerGradCamPlusPlus", "grad-cam++"),
        ("Score_CAM", "score-cam"),
        ("integrated gradients", "integrated-gradients"),
        ("LayerGradientXActivation", "gradient-x-activation"),
        ("FusionCAM:RAW", "fusion-cam:raw"),
        ("Fusion(XGradCAM, Group-CAM):Released", "fusion(x-grad-cam,group-cam):released"),
    ],
)
def test_names_are_matched_loosely(loose: str, name: str) -> None:
    assert parse_method(loose) == parse_method(name)
    assert parse_method(loose).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scorcam", "Unknown method 'scorcam'. Did you mean 'score-cam'"),
        ("fusion(grad-cam,scor-cam)", "Unknown method 'scor-cam' to fuse. Did you mean 'score-cam'"),
        ("fusion-cam:row", "Unknown weighting 'row'. Did you mean 'raw'"),
        ("grad-cam:raw", "Unknown method 'grad-cam:raw'"),
    ],
)
def test_unknown_names(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
@pytest.mark.parametrize("name", METHODS + CONTROLS)
def test_every_name_builds_an_attribution(name: str, net: SmallNet, images: Tensor) -> None:
    if name == "group-cam":
        assert isinstance(parse_method(name).build(net, net.features, {}), LayerGroupCam)
        return
    attribution = parse_method(name).build(net, net.features, {})
    assert len(attribution.attribute(images, target=0)) == len(images)


def test_the_compiled_model_does_the_masked_passes_of_ours_alone(net: SmallNet) -> None:
    def compiled(inputs: Tensor) -> Tensor:
        return net(inputs)

    score_cam = LayerScoreCam(compiled, net.features)
    for name in ("group-cam", "union-cam", "fusion-cam", "fusion(x-grad-cam,integrated-gradients)"):
        assert (
            parse_method(name).build(net, net.features, {"score-cam": score_cam}, compiled=compiled).forward_func
            is compiled
        )
    for name in ("grad-cam", "guided-grad-cam", "integrated-gradients"):
        assert (
            parse_method(name).build(net, net.features, {"score-cam": score_cam}, compiled=compiled).forward_func is net
        )
    fused = parse_method("fusion-cam").build(net, net.features, {"score-cam": score_cam}, compiled=compiled)
    assert isinstance(fused, LayerFusionCam)
    assert fused.gradient_method.forward_func is net


def test_fusions_hold_their_components(net: SmallNet) -> None:
    score_cam = LayerScoreCam(net, net.features)
    fused = parse_method("fusion(x-grad-cam,score-cam)").build(net, net.features, {"score-cam": score_cam})
    assert isinstance(fused, LayerFusionCam)
    assert isinstance(fused.gradient_method, LayerXGradCam)
    assert fused.region_method is score_cam
    plain = parse_method("fusion-cam").build(net, net.features, {"score-cam": score_cam})
    assert isinstance(plain, LayerFusionCam)
    assert type(plain.gradient_method) is LayerGradCam


def test_score_cam_is_remembered_for_the_same_inputs_and_target_alone(net: SmallNet, images: Tensor) -> None:
    rows = 0

    def count(_: object, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    net.register_forward_pre_hook(count)
    remembered = RememberedScoreCam(net, net.features, 0.0)
    first = remembered.attribute(images, target=[0, 1, 2])
    once = rows
    assert torch.equal(first, LayerScoreCam(net, net.features).attribute(images, target=[0, 1, 2]))
    rows = 0
    assert torch.equal(remembered.attribute(images.clone(), target=[0, 1, 2]), first)
    assert torch.equal(remembered.attribute(images.clone(), target=torch.tensor([0, 1, 2])), first)
    assert rows == 0
    assert remembered.saved > 0
    remembered.attribute(images, target=[0, 1, 1])
    assert rows == once
    rows = 0
    remembered.attribute(images + 1, target=[0, 1, 1])
    assert rows == once
