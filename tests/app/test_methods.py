import pytest
from captum.attr import LayerGradCam
from torch import Tensor

from captum_fusion import LayerFusionCam, LayerGroupCam, LayerScoreCam, LayerUnionCam, LayerXGradCam
from captum_fusion._app.methods import CONTROLS, METHODS, Method, parse_method
from tests.conftest import SmallNet


def test_names() -> None:
    assert parse_method("grad-cam") == Method("grad-cam")
    assert parse_method("fusion-cam") == Method("fusion-cam", ("grad-cam", "score-cam"))
    assert parse_method("fusion-cam:raw") == Method("fusion-cam:raw", ("grad-cam", "score-cam"), "raw")
    fused = Method("fusion(x-grad-cam,group-cam):released", ("x-grad-cam", "group-cam"), "released")
    assert parse_method("fusion(x-grad-cam, group-cam):released") == fused
    assert parse_method("fusion-cam", "raw") == Method("fusion-cam", ("grad-cam", "score-cam"), "raw")
    assert parse_method("fusion-cam:raw", "released") == parse_method("fusion-cam:raw")


def test_parts() -> None:
    both = ("gradient_attributions", "region_attributions")
    for name, parts, arguments in [
        ("fusion(x-grad-cam,rise)", ("x-grad-cam", "rise"), both),
        ("union-cam", ("score-cam",), both[1:]),
        ("score-cam", (), ()),
    ]:
        method = parse_method(name)
        assert (method.parts, method.part_arguments) == (parts, arguments)


def test_names_are_matched_loosely() -> None:
    for loose, name in {
        "Grad-CAM": "grad-cam",
        "gradcam": "grad-cam",
        "LayerGradCam": "grad-cam",
        "GradCAM++": "grad-cam++",
        "grad-cam-plus-plus": "grad-cam++",
        "LayerGradCamPlusPlus": "grad-cam++",
        "Score_CAM": "score-cam",
        "integrated gradients": "integrated-gradients",
        "LayerGradientXActivation": "gradient-x-activation",
        "FusionCAM:RAW": "fusion-cam:raw",
        "Fusion(XGradCAM, Group-CAM):Released": "fusion(x-grad-cam,group-cam):released",
    }.items():
        assert parse_method(loose) == parse_method(name)
        assert parse_method(loose).name == name


def test_unknown_names() -> None:
    for text, message in {
        "scorcam": "Unknown method 'scorcam'. Did you mean 'score-cam'",
        "fusion(grad-cam,scor-cam)": "Unknown method 'scor-cam' to fuse. Did you mean 'score-cam'",
        "fusion-cam:row": "Unknown weighting 'row'. Did you mean 'raw'",
        "grad-cam:raw": "Unknown method 'grad-cam:raw'",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_method(text)


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
def test_every_name_builds_an_attribution(net: SmallNet, images: Tensor) -> None:
    for name in METHODS + CONTROLS:
        attribution = parse_method(name).build(net, net.features)
        # Its blurred baseline is larger than these images.
        if not isinstance(attribution, LayerGroupCam):
            assert len(attribution.attribute(images, target=0)) == len(images), name


def test_the_compiled_model_does_the_masked_passes_of_ours_alone(net: SmallNet) -> None:
    def compiled(inputs: Tensor) -> Tensor:
        return net(inputs)

    for name in ("group-cam", "union-cam", "fusion-cam", "fusion(x-grad-cam,integrated-gradients)"):
        assert parse_method(name).build(net, net.features, compiled=compiled).forward_func is compiled
    for name in ("grad-cam", "guided-grad-cam", "integrated-gradients"):
        assert parse_method(name).build(net, net.features, compiled=compiled).forward_func is net
    fused = parse_method("fusion-cam").build(net, net.features, compiled=compiled)
    assert isinstance(fused, LayerFusionCam)
    assert fused.gradient_method.forward_func is net


def test_fusions_have_their_components_and_the_tolerance(net: SmallNet) -> None:
    fused = parse_method("fusion(x-grad-cam,score-cam)").build(net, net.features, tolerance=0.1)
    union = parse_method("union-cam").build(net, net.features, tolerance=0.1)
    assert isinstance(fused, LayerFusionCam)
    assert isinstance(union, LayerUnionCam)
    assert isinstance(fused.gradient_method, LayerXGradCam)
    for score_cam in (fused.region_method, union.region_method):
        assert isinstance(score_cam, LayerScoreCam)
        assert score_cam.tolerance == 0.1
    plain = parse_method("fusion-cam").build(net, net.features)
    assert isinstance(plain, LayerFusionCam)
    assert type(plain.gradient_method) is LayerGradCam
