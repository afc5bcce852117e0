"""Pictures explained from Python."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image
from torch import Tensor, nn

import captum_fusion.explain
from captum_fusion import LayerFusionCam, LayerUnionCam, Progress, Stopped, progress_to
from captum_fusion._app.options import ModelSelection
from captum_fusion._app.output_files import archive
from captum_fusion.explain import ClassifiedImage, Explainer, explain
from captum_fusion.metrics import saliency_map
from tests.conftest import Counter, SmallNet

MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def test_it_is_what_the_classes_give(net: SmallNet, photograph: Image.Image) -> None:
    explanation = explain(
        photograph, model=net, target=2, methods=["Grad-CAM", "fusion-cam:released"], size=24, mean=MEAN, std=STD
    )
    assert (explanation.model, explanation.layer, explanation.weights) == ("SmallNet", "relu", "default")
    assert (explanation.target, explanation.category) == (2, "2")
    assert list(explanation.maps) == list(explanation.masked_probabilities) == ["grad-cam", "fusion-cam:released"]
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    inputs = (explanation.pixels - mean) / std
    with torch.no_grad():
        probabilities = net(inputs).softmax(1)[0]
    torch.testing.assert_close(explanation.probabilities, probabilities)
    assert explanation.probability == pytest.approx(probabilities[2].item())
    assert [index for index, _, _ in explanation.top(2)] == probabilities.argsort(descending=True)[:2].tolist()
    grad_cam = saliency_map(LayerGradCam(net, net.relu).attribute(inputs, target=2), (24, 24))
    torch.testing.assert_close(explanation.maps["grad-cam"], grad_cam)
    fused, stages = LayerFusionCam(net, net.relu).attribute(inputs, target=2, weighting="released", return_stages=True)
    torch.testing.assert_close(explanation.maps["fusion-cam:released"], fused[:, :1])
    kept = explanation.stages["fusion-cam:released"]
    torch.testing.assert_close(kept.denoised, stages.denoised)
    torch.testing.assert_close(kept.region_contribution, stages.region_contribution)
    for name, values in explanation.maps.items():
        with torch.no_grad():
            remains = net(inputs * values).softmax(1)[0, 2].item()
        assert explanation.masked_probabilities[name] == pytest.approx(remains, abs=1e-6)
    assert explanation.notes == ()


def test_models_may_return_their_scores_among_others(net: SmallNet, photograph: Image.Image) -> None:
    expected = explain(photograph, model=net, size=24, methods=["grad-cam"])
    for output in (lambda scores: (scores, 0), lambda scores: {"out": scores, "aux": scores + 1}):
        with net.register_forward_hook(lambda _, __, scores, output=output: output(scores)):
            ours = explain(photograph, model=net, size=24, methods=["grad-cam"])
        torch.testing.assert_close(ours.probabilities, expected.probabilities)
        torch.testing.assert_close(ours.maps, expected.maps)


def test_without_methods_the_stages_of_fusion_cam(net: SmallNet, photograph: Image.Image) -> None:
    explanation = explain(photograph, model=net, size=24)
    assert list(explanation.maps) == ["Grad-CAM", "Denoised Grad-CAM", "Score-CAM", "Combined", "Fusion-CAM"]
    assert explanation.target == explanation.probabilities.argmax()
    assert explanation.maps["Combined"] is explanation.stages["fusion-cam"].combined
    # The picture is resized to 36 by 27 pixels, of which 24 by 24 from 6 and 2 (half of 3, to even) are seen.
    assert explanation.frame == pytest.approx((6 * 40 / 36, 2 * 30 / 27, 30 * 40 / 36, 26 * 30 / 27))


@pytest.mark.parametrize("method", ["score-cam", "union-cam", "fusion-cam", "fusion(grad-cam,score-cam)"])
def test_score_cam_within_a_tolerance_alone_or_fused(photograph: Image.Image, method: str) -> None:
    model = SmallNet(channels=150).eval()
    model.forward = counter = Counter(model.forward)
    exact = explain(photograph, model=model, layer="features", size=24, methods=[method])
    all_rows = counter.rows
    quick = explain(photograph, model=model, layer="features", size=24, methods=[method], tolerance=0.1)
    assert counter.rows < 1.5 * all_rows
    (expected,), (found,) = exact.maps.values(), quick.maps.values()
    assert 0 < (expected - found).abs().max() < 0.2
    with pytest.raises(ValueError, match=r"tolerance is -1; expected a number in \[0, 1\)"):
        explain(photograph, model=model, tolerance=-1)


def test_a_model_that_is_given_stays_as_it_was(net: SmallNet, photograph: Image.Image) -> None:
    net.train()
    net.stem.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    explain(photograph, model=net, size=24, methods=["score-cam"])
    with pytest.raises(RuntimeError, match="group-cam fails"):
        explain(photograph, model=Failing(net), layer="net.relu", size=24, methods=["group-cam"])
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


class Failing(nn.Module):
    """Fails where gradients are wanted."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise MemoryError("full")
        result: Tensor = self.net(x)
        return result


def test_it_takes_files_and_names(photograph: Image.Image, tmp_path: Path) -> None:
    photograph.save(tmp_path / "a.png")
    options: dict[str, Any] = {"model": "tests.app.test_cli:small_net", "size": 24, "methods": ["grad-cam"]}
    from_file = explain(str(tmp_path / "a.png"), **options)
    assert from_file.image == str(tmp_path / "a.png")
    torch.testing.assert_close(from_file.maps, explain(photograph, **options).maps)
    assert from_file.model == "tests.app.test_cli:small_net"


def test_what_cannot_be(net: SmallNet, photograph: Image.Image) -> None:
    for options, message in [
        ({"weights": "none"}, "weights is 'none', but a model object keeps its own weights"),
        ({"device": "cpu"}, "device is 'cpu', but a model object stays on its own device"),
        ({"layer": "head"}, "'head' returns shape"),
        ({"target": 3}, "target is 3; expected an index below 3"),
        ({"target": -1}, "target is -1; expected an index below 3"),
        ({"percentile": 100}, r"percentile is 100; expected a number in \[0, 100\)"),
        ({"weighting": "row"}, "weighting is 'row'; expected one of"),
        ({"activation": "tanh"}, "activation is 'tanh'; expected one of"),
        ({"methods": ["gradcom"]}, "Unknown method 'gradcom'. Did you mean 'grad-cam'"),
    ]:
        with pytest.raises(ValueError, match=message):
            explain(photograph, model=net, **{"size": 24, **options})


def test_unknown_options(net: SmallNet, photograph: Image.Image) -> None:
    with pytest.raises(TypeError, match="Unknown option 'sizes'; expected some of weights, layer, grid, size, "):
        explain(photograph, model=net, sizes=24)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="OpenedPicture is now ClassifiedImage"):
        assert captum_fusion.explain.OpenedPicture is ClassifiedImage
    with pytest.warns(DeprecationWarning, match="kept is now masked_probabilities"):
        assert explain(photograph, model=net, size=24, methods=["saliency"]).kept.keys() == {"saliency"}


def test_a_callable_is_imported_without_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    (tmp_path / "model_of_a_user.py").write_text("import torch\nnet = torch.nn.Identity")
    with pytest.raises(ValueError, match="No module named 'model_of_a_user'"):
        Explainer("model_of_a_user:net")
    assert sys.path == before


def test_percentile_and_weighting_reach_the_fusions(net: SmallNet, photograph: Image.Image) -> None:
    methods = ["fusion-cam", "fusion-cam:released", "union-cam"]
    explanation = explain(
        photograph,
        model=net,
        target=1,
        methods=methods,
        percentile=60,
        weighting="normalized",
        size=24,
        mean=MEAN,
        std=STD,
    )
    assert (explanation.percentile, explanation.weighting, explanation.tolerance) == (60, "normalized", 0)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    inputs = (explanation.pixels - mean) / std
    fusion_cam, union_cam = LayerFusionCam(net, net.relu), LayerUnionCam(net, net.relu)
    expected = [
        fusion_cam.attribute(inputs, target=1, percentile=60, weighting="normalized"),
        fusion_cam.attribute(inputs, target=1, percentile=60, weighting="released"),
        union_cam.attribute(inputs, target=1, percentile=60),
    ]
    for name, values in zip(methods, expected, strict=True):
        torch.testing.assert_close(explanation.maps[name], values[:, :1])
    plain = explain(photograph, model=net, target=1, size=24, mean=MEAN, std=STD, weighting="normalized")
    torch.testing.assert_close(
        plain.maps["Fusion-CAM"], fusion_cam.attribute(inputs, target=1, weighting="normalized")[:, :1]
    )


def test_only_what_is_not_known_is_computed(photograph: Image.Image) -> None:
    model = SmallNet(channels=150).eval()
    model.forward = counter = Counter(model.forward)

    def rows_of(*arguments: Any, **options: Any) -> int:
        counter.sizes.clear()
        picture.explain(*arguments, **options)
        return counter.rows

    picture = Explainer(model, layer="features", size=24).open(photograph)
    assert rows_of(1, ["fusion-cam"]) > 150
    assert rows_of(1, ["fusion-cam"]) == 0
    # An unmasked pass, the blank, D, R and C with a control each, and what the map keeps.
    assert rows_of(1, ["fusion-cam"], percentile=50) <= 8
    assert rows_of(1, ["fusion-cam"], weighting="normalized") <= 8
    # What the maps keep.
    assert rows_of(1, ["grad-cam", "score-cam"]) == 2
    assert rows_of(1, ["grad-cam", "score-cam"], percentile=70, weighting="released") == 0
    assert rows_of(1, ["grad-cam"], tolerance=0.1) == 0
    assert 10 < rows_of(1, ["score-cam"], tolerance=0.1) < 150
    assert rows_of(2, ["fusion-cam"]) > 150


@pytest.mark.parametrize("name", ["fusion-cam", "union-cam", "fusion(saliency,union-cam)"])
def test_what_is_remembered_is_what_would_be_computed(net: SmallNet, photograph: Image.Image, name: str) -> None:
    picture = Explainer(net, size=24).open(photograph)
    picture.explain(0, [name], percentile=5)
    again = picture.explain(0, [name], percentile=45, weighting="normalized")
    fresh = explain(photograph, model=net, size=24, target=0, methods=[name], percentile=45, weighting="normalized")
    assert torch.equal(again.maps[name], fresh.maps[name])
    assert again.masked_probabilities == fresh.masked_probabilities


def test_other_weights_are_never_explained_by_what_is_remembered(net: SmallNet, photograph: Image.Image) -> None:
    image = Explainer(net, size=24).open(photograph)
    methods = ["grad-cam", "fusion(x-grad-cam,group-cam)"]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)

    def train() -> None:
        net(image.inputs)[0, 0].backward()
        optimizer.step()

    for change in (
        lambda: None,
        lambda: net.load_state_dict(SmallNet().state_dict()),
        train,
        lambda: net.load_state_dict(SmallNet().state_dict(), assign=True),
    ):
        change()
        remembered = image.explain(0, methods)
        computed = explain(photograph, model=net, target=0, methods=methods, size=24)
        torch.testing.assert_close(remembered.maps, computed.maps)
        assert remembered.probability == computed.probability
        assert remembered.masked_probabilities == computed.masked_probabilities


def test_a_listener_hears_of_the_passes_and_stops_them(photograph: Image.Image) -> None:
    model = SmallNet(channels=600)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    picture = Explainer(model, layer="features", size=24).open(photograph)
    heard: list[Progress] = []

    def stop(progress: Progress) -> None:
        heard.append(progress)
        if progress.done:
            raise Stopped

    with pytest.raises(Stopped), progress_to(stop):
        picture.explain(1, ["fusion-cam"], show_progress=True)
    assert 0 < heard[-1].done < heard[-1].total
    assert [progress.done for progress in heard[:-1]] == [0] * (len(heard) - 1)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    heard.clear()
    with progress_to(heard.append):
        explanation = picture.explain(1, ["fusion-cam"], show_progress=True)
    assert heard[-1].done == heard[-1].total > 500
    fresh = explain(photograph, model=model, layer="features", size=24, target=1, methods=["fusion-cam"])
    assert torch.equal(explanation.maps["fusion-cam"], fresh.maps["fusion-cam"])


def test_the_precision_of_every_pass_is_the_option_and_is_recorded(photograph: Image.Image) -> None:
    # Score-CAM first: the weights that autocast has converted without gradients must not cost Grad-CAM its own.
    methods = ["score-cam", "grad-cam", "fusion(score-cam,grad-cam)"]
    exact = explain(photograph, model="tests.conftest:SmallNet", target=2, methods=methods, size=24)
    assert (exact.precision, exact.notes) == ("float32", ())
    # As the page has it.
    (options,) = ModelSelection(models=["tests.conftest:SmallNet"], size=24, precision="bfloat16").each()
    explainer = Explainer(**options)
    types = set()
    explainer.classifier.model.relu.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    image = explainer.open(photograph)
    explanation = image.explain(2, methods)
    image.curves(explanation, "score-cam", steps=4)
    assert types == {torch.bfloat16}
    assert (explanation.precision, explanation.notes) == ("bfloat16", ("The forward passes ran in bfloat16",))
    with np.load(io.BytesIO(archive(explanation))) as saved:
        assert json.loads(str(saved["metadata"]))["precision"] == "bfloat16"
    for name in methods:
        difference = (explanation.maps[name] - exact.maps[name]).abs().max()
        assert 0 < difference < 0.1, name
    # A caller's autocast would make the record wrong.
    with torch.autocast("cpu", torch.bfloat16):
        again = explain(photograph, model="tests.conftest:SmallNet", target=2, methods=methods, size=24)
    assert all(torch.equal(again.maps[name], exact.maps[name]) for name in methods)


def test_threads_take_turns(photograph: Image.Image) -> None:
    model = SmallNet(channels=60)
    explainer = Explainer(model, size=24)
    pictures = [photograph, photograph.rotate(90), photograph.rotate(180), photograph.transpose(0)]
    methods = ["saliency", "fusion-cam", "guided-grad-cam"]
    alone = [Explainer(model, size=24).open(picture).explain(1, methods) for picture in pictures]

    def work(picture: Image.Image) -> dict[str, Tensor]:
        return explainer.open(picture).explain(1, methods).maps

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, pictures))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one.maps[name], other[name]) for name in methods)
    assert model.training
