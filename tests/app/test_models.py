import argparse
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Small_Weights, get_model

from captum_fusion._app.models.classifier import Classifier, read_categories
from captum_fusion._app.models.layer import choose_layer
from captum_fusion._app.models.loading import find_device, load_classifier
from captum_fusion._app.models.preprocessing import Preprocessing
from tests.conftest import SmallNet


def load(name: str | None, weights: str | None = "none") -> Classifier:
    return load_classifier(name, weights)


def test_bundled_model_knows_a_cup_of_espresso() -> None:
    data = pytest.importorskip("skimage.data")
    classifier = load(None, None)
    pixels = classifier.preprocessing.crop(Image.fromarray(data.coffee()))
    assert pixels.shape == (1, 3, 224, 224)
    with torch.no_grad():
        probabilities = classifier.model(classifier.preprocessing.normalize(pixels)).softmax(1)[0]
    assert classifier.category(int(probabilities.argmax())) == "espresso"
    assert not classifier.model.training


def test_preprocessing_is_that_of_the_torchvision_weights() -> None:
    # This entry crops 224 out of 256 and normalizes by ImageNet's mean and standard deviation.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8))
    preprocessing = load("mobilenet_v3_small").preprocessing
    ours = preprocessing.normalize(preprocessing.crop(image))
    torch.testing.assert_close(ours[0], MobileNet_V3_Small_Weights.DEFAULT.transforms()(image))


def test_given_preprocessing_wins() -> None:
    given = load_classifier("mobilenet_v3_small", "none", 64, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0)).preprocessing
    assert (given.resize, given.size, given.mean, given.std) == (73, 64, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


def test_the_size_that_a_model_has_changes_nothing_and_another_one_leaves_the_part_that_is_seen() -> None:
    for name in ("mobilenet_v2", "regnet_y_400mf", "tests.app.test_cli:small_net"):
        own = load_classifier(name, None if ":" in name else "none").preprocessing
        for size in (own.size, own.size // 2):
            resized = load_classifier(name, None if ":" in name else "none", size).preprocessing
            assert (resized.size, resized.resize) == (size, round(own.resize * size / own.size))


def test_random_weights_are_the_same_each_time_and_leave_the_random_state() -> None:
    state = torch.get_rng_state()
    first, second = (load("squeezenet1_1").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_state_dict_of_another_number_of_classes(tmp_path: Path) -> None:
    trained = get_model("mobilenet_v3_small", weights=None, num_classes=5)
    torch.save(trained.state_dict(), tmp_path / "leaves.pt")
    classifier = load("mobilenet_v3_small", str(tmp_path / "leaves.pt"))
    assert torch.equal(classifier.model.classifier[3].weight, trained.classifier[3].weight)
    assert classifier.categories is None


def test_a_model_that_cannot_be_built_without_values(tmp_path: Path) -> None:
    trained = get_model("regnet_y_400mf", weights=None, num_classes=5)
    torch.save(trained.state_dict(), tmp_path / "leaves.pt")
    assert torch.equal(load("regnet_y_400mf", str(tmp_path / "leaves.pt")).model.fc.weight, trained.fc.weight)


def test_bundled_model_with_a_state_dict_of_another_number_of_classes(tmp_path: Path) -> None:
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    trained = lite.EfficientNet.from_name("efficientnet-lite0", image_size=224, num_classes=3)
    torch.save(trained.state_dict(), tmp_path / "leaves.pt")
    classifier = load("efficientnet-lite0", str(tmp_path / "leaves.pt"))
    assert torch.equal(classifier.model._fc.weight, trained._fc.weight)
    assert classifier.categories is None
    # The input is what the network with ImageNet's classes takes.
    assert classifier.preprocessing == load("efficientnet-lite0").preprocessing


def test_state_dict_of_another_model(tmp_path: Path) -> None:
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt does not fit mobilenet_v3_small"):
        load("mobilenet_v3_small", str(tmp_path / "other.pt"))


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"epoch": 3}, []], ids=["pickled module", "numbers", "list"])
def test_weights_that_are_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt (does not hold weights only|holds)"):
        load("mobilenet_v3_small", str(tmp_path / "bad.pt"))


def test_unknown_names_come_with_the_close_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown torchvision classifier 'resnet5'.*resnet50"):
        load("resnet5")
    with pytest.raises(ValueError, match=r"tests.conftest:Nothing cannot be imported"):
        load("tests.conftest:Nothing", None)
    with pytest.raises(ValueError, match="no_such_package:build cannot be imported"):
        load("no_such_package:build", None)
    with pytest.raises(TypeError, match=r"builtins:dict returned dict; expected a torch.nn.Module"):
        load("builtins:dict", None)
    with pytest.raises(FileNotFoundError):
        load("mobilenet_v3_small", str(tmp_path / "missing.pt"))


def trained_net() -> nn.Module:
    """Loaded weights below a new head."""
    net = SmallNet()
    generator = torch.Generator().manual_seed(7)
    for parameter in (net.stem.weight, net.features.weight):
        nn.init.normal_(parameter, generator=generator)
    return net


def test_weights_of_a_callable_are_never_called_random() -> None:
    message = "weights is 'none', but tests.app.test_models:trained_net builds its model with weights of its own"
    with pytest.raises(ValueError, match=message):
        load("tests.app.test_models:trained_net", "none")
    load("tests.app.test_models:trained_net", None)
    first, second = (load("tests.conftest:SmallNet", weights).model for weights in ("none", None))
    assert torch.equal(first.stem.weight, second.stem.weight)


def classifier_of(*categories: str) -> Classifier:
    return Classifier("birds", nn.Identity(), Preprocessing(8, 8, (0.0,), (1.0,)), categories or None)


def test_targets() -> None:
    for target, index in [("1", 1), (1, 1), ("index:1", 1), ("egyptian cat", 2), ("Egyptian_cat", 2), ("2024", 4)]:
        assert classifier_of("crane", "tabby", "Egyptian cat", "crane", "2024").target(target, 5) == index


def test_targets_that_are_no_class() -> None:
    for target, message in [
        ("taby", "Unknown category 'taby'. Did you mean 'tabby'"),
        ("crane", r"categories \[0, 3\] are all named 'crane'"),
        ("4", "target is 4; expected an index below 4"),
        (-1, "target is -1; expected an index below 4"),
        ("index:x", "target is x; expected an index below 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            classifier_of("crane", "tabby", "Egyptian cat", "crane").target(target, 4)
        with pytest.raises(ValueError, match=r"birds has no category names|expected an index below"):
            classifier_of().target(target, 4)


def test_a_category_whose_name_is_a_number_is_never_taken_for_another_class() -> None:
    folders = classifier_of("1", "10", "2", "3")
    assert folders.target("10", 4) == 1
    assert folders.target("3", 4) == 3
    with pytest.raises(ValueError, match="'1', the name of class 0 and the index of '10'; expected 'index:0' or"):
        folders.target("1", 4)
    assert [folders.target(target, 4) for target in ("index:0", 1, "index:1")] == [0, 1, 1]


def test_classes_of_one_name_are_told_apart() -> None:
    assert [classifier_of("crane", "tabby", "crane").category(index) for index in range(4)] == [
        "crane (0)",
        "tabby",
        "crane (2)",
        "3",
    ]


def test_category_files(tmp_path: Path) -> None:
    for name, content in (
        ("names.txt", "\ufeffcat\ndog\n"),
        ("names.json", '["cat", "dog"]'),
        ("names.json", '{"dog": 1, "cat": 0}'),
    ):
        file = tmp_path / name
        file.write_text(content, encoding="utf-8")
        assert read_categories(file) == ("cat", "dog"), content
        assert load_classifier(SmallNet(classes=2), classes=file).categories == ("cat", "dog")
        with pytest.raises(ValueError, match="returns 3 scores for 2 category names"):
            load_classifier(SmallNet(), classes=file).scores(torch.rand(2, 3, 8, 8))


def test_files_that_hold_no_categories(tmp_path: Path) -> None:
    for name, content, message in (
        ("names.txt", b"cat\n\ndog\n", "holds no category names"),
        ("names.json", b'{"dog": 1, "cat": 3}', "holds no category names"),
        ("names.json", b'{"0": "dog", "x": 1}', "cannot be read as category names"),
        ("names.json", b"{", "cannot be read as category names"),
        ("names.txt", b"\xff\xfe", "cannot be read as category names"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            read_categories(tmp_path / name)


def test_a_model_of_one_channel_sees_grey_pictures() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3))
    preprocessing = load_classifier(model, size=8).preprocessing
    # An input of 8 pixels is the middle of 9.
    grey = np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8)
    pixels = preprocessing.crop(Image.fromarray(grey))
    assert pixels.shape == (1, 1, 8, 8)
    assert torch.equal(pixels[0, 0], torch.from_numpy(grey)[:8, :8] / 255)
    given = load_classifier(model, size=8, mean=(0.5,), std=(0.25,)).preprocessing
    torch.testing.assert_close(given.normalize(pixels), (pixels - 0.5) / 0.25)
    with pytest.raises(ValueError, match=r"mean is \(0.5, 0.5, 0.5\); expected 1 values, one for each channel"):
        load_classifier(model, mean=(0.5,) * 3)


def test_a_long_message_from_elsewhere_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise NotImplementedError("Could not run 'aten::zeros'. " + "CPU: registered at nowhere\n" * 300)

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(ValueError, match=r"^device is 'mps', which cannot be used: NotImplementedError: ") as raised:
        find_device("mps")
    assert len(str(raised.value)) < 500


def test_choose_layer() -> None:
    model = get_model("resnet18", weights=None).eval()
    inputs = torch.rand(1, 3, 64, 64)
    chosen = choose_layer(model, inputs, "layer4.1.relu")
    assert (chosen.name, chosen.layer, chosen.form) == ("layer4.1.relu", model.layer4[1].relu, "channels first")
    assert choose_layer(model, inputs, None).layer is model.layer4
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_are_no_feature_map_are_refused_with_those_that_are() -> None:
    class Net(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.spare = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.relu(self.features(self.stem(x)))).flatten(1))

    net, inputs = Net().eval(), torch.rand(2, 3, 16, 16)
    there_are = r"Its feature maps: stem \(4, 8, 8\), features \(6, 8, 8\), relu \(6, 8, 8\)$"
    for name, message in (
        ("nope", r"no layer 'nope'\. "),
        ("reul", r"no layer 'reul'\. Did you mean 'relu'\? "),
        # One pixel: its map would be all ones, and keep everything.
        ("pool", r"'pool' returns shape \(2, 6, 1, 1\); expected a feature map .* more than one pixel, "),
        ("head", r"'head' returns shape \(2, 3\); expected a feature map"),
        ("spare", r"'spare' does not run in a forward pass of the model\. "),
    ):
        with pytest.raises(ValueError, match=message + (".*" if "feature map" in message else "") + there_are):
            choose_layer(net, inputs, name)


def flat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of these shapes that take no space on the disk."""
    return {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state.items()}


@pytest.mark.parametrize(("name", "auxiliary"), [("googlenet", True), ("inception_v3", False)])
def test_a_file_of_official_weights_brings_their_transform_of_the_input(
    name: str, auxiliary: bool, tmp_path: Path
) -> None:
    with torch.device("meta"):
        built = get_model(name, weights=None, aux_logits=auxiliary, init_weights=False)
    torch.save(flat(built.state_dict()), tmp_path / "official.pth")
    model = load(name, str(tmp_path / "official.pth")).model
    # torchvision's own builders set it whenever they are given weights.
    assert model.transform_input
    assert model.state_dict().keys() == built.state_dict().keys()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: prefixed(state, "module."),
        lambda state: {"n_averaged": torch.tensor(3), **prefixed(state, "module.")},
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"epoch": 3, "state_dict": prefixed(state, "model.net."), "hyper_parameters": {"lr": 0.1}},
        lambda state: {"net": prefixed(state, "_orig_mod.module."), "acc": 0.5},
        lambda state: {"model": {"state_dict": state}},
    ],
)
def test_checkpoints_and_wrappers_of_state_dicts(tmp_path: Path, wrap: Any) -> None:
    state = get_model("squeezenet1_1", weights=None, num_classes=4).state_dict()
    torch.save(wrap(state), tmp_path / "checkpoint.pt")
    loaded = load("squeezenet1_1", str(tmp_path / "checkpoint.pt")).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def test_of_averaged_and_last_weights_the_averaged_ones_are_used_and_named(tmp_path: Path) -> None:
    last, averaged = (get_model("squeezenet1_1", weights=None, num_classes=4).state_dict() for _ in range(2))
    torch.save({"state_dict": last, "state_dict_ema": averaged}, tmp_path / "both.pt")
    with pytest.warns(UserWarning, match="both.pt holds state_dict_ema and state_dict; state_dict_ema is used"):
        loaded = load("squeezenet1_1", str(tmp_path / "both.pt")).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in averaged.items())


def test_files_without_weights_are_refused_with_their_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = get_model("squeezenet1_1", weights=None, num_classes=4).state_dict()
    torch.save({"weights": state, "optimizer": {"lr": 0.1}}, "custom.pt")
    with pytest.raises(ValueError, match=r"custom.pt holds dict with the entries weights, optimizer; expected a state"):
        load("squeezenet1_1", "custom.pt")
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, "options.pt")
    with pytest.raises(ValueError, match=r"It holds an argparse\.Namespace\. Convert it: ") as raised:
        load("squeezenet1_1", "options.pt")
    # Its two lines do what they promise.
    lines = str(raised.value).partition("Convert it: ")[2].partition(". Expected")[0]
    exec(lines, {"torch": torch, "argparse": argparse})
    assert load("squeezenet1_1", "weights.pt").categories is None


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it ran",)


def test_files_that_are_no_weights_never_run_and_no_message_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1), "b": Malicious()}, "malicious.pt")
    Path("malicious.pkl").write_bytes(pickle.dumps(Malicious()))
    Path("text.pt").write_text("Some notes, not weights.\n" * 30)
    Path("empty.pt").write_bytes(b"")
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=f"^{file.name} does not hold weights only") as raised:
            load("squeezenet1_1", file.name)
        assert "weights_only" not in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not Path("it ran").exists()


def test_weights_that_do_not_fit_are_told_in_a_line(tmp_path: Path) -> None:
    state = get_model("squeezenet1_1", weights=None, num_classes=4).state_dict()
    state["features.0.bias"] = torch.zeros(3)
    state["extra"] = state.pop("features.0.weight")
    torch.save(state, tmp_path / "other.pt")
    message = (
        "other.pt does not fit squeezenet1_1: 1 of the model's entries are missing (features.0.weight); "
        "1 entries are none of the model's (extra); 1 have another shape (features.0.bias)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load("squeezenet1_1", str(tmp_path / "other.pt"))


def broken_builder() -> nn.Module:
    raise KeyError("width")


def leaving_builder() -> nn.Module:
    sys.exit("enough")


def test_builders_that_fail_are_named_with_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = broken_builder.__code__.co_firstlineno + 1
    here = re.escape(f"({__file__}, line {line})")
    with pytest.raises(ValueError, match=f"broken_builder cannot be built: KeyError: 'width' {here}"):
        load("tests.app.test_models:broken_builder", None)
    with pytest.raises(ValueError, match="cannot be built: SystemExit: enough"):
        load("tests.app.test_models:leaving_builder", None)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module_of_a_user.py").write_text("import math\n1 / 0\n")
    with pytest.raises(ValueError, match=r"imported: ZeroDivisionError: .*broken_module_of_a_user.py, line 2"):
        load("broken_module_of_a_user:net", None)


def test_models_that_are_no_classifier() -> None:
    for output, error, message in [
        (lambda scores: {"logits": scores}, TypeError, "returns dict; expected one score for each example"),
        (lambda scores: (scores, scores), TypeError, "returns tuple; expected"),
        (lambda scores: scores[:1], ValueError, r"returns shape \(1, 3\) of torch.float32 for 2 examples; expected"),
        (lambda scores: scores[0], ValueError, r"returns shape \(3,\)"),
        (lambda scores: scores[:, :1], ValueError, "at least 2 classes"),
        (lambda scores: scores[..., None, None], ValueError, r"returns shape \(2, 3, 1, 1\)"),
        (lambda scores: scores.long(), ValueError, "of torch.int64"),
        (lambda scores: scores / 0, RuntimeError, "scores that are not finite"),
    ]:
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.register_forward_hook(lambda _, __, scores, output=output: output(scores))
        classifier = Classifier("odd", model, Preprocessing(4, 4, (0.0,) * 3, (1.0,) * 3), None)
        with pytest.raises(error, match=f"^odd .*{message}"):
            classifier.scores(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(("resize", "size"), [(256, 224), (40, 32), (32, 32)])
@pytest.mark.parametrize(("width", "height"), [(300, 240), (61, 47), (47, 190)])
def test_the_frame_is_where_the_crop_lies(width: int, height: int, resize: int, size: int) -> None:
    preprocessing = Preprocessing(resize, size, (0.0,) * 3, (1.0,) * 3)
    # A picture whose colours tell the place of each pixel.
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    places = np.stack([across, down, 0 * down], axis=2)
    seen = preprocessing.crop(Image.fromarray((255 * places).round().astype(np.uint8)))[0]
    x1, y1, x2, y2 = preprocessing.frame(width, height)
    pixel = (x2 - x1) / size
    # The first and the last column and row of the crop lie half a pixel inside the frame.
    for channel, (start, end, side) in enumerate(((x1, x2, width), (y1, y2, height))):
        values = seen[channel].mean(dim=channel) * (side - 1) + 0.5
        assert values[0].item() == pytest.approx(start + pixel / 2, abs=0.75 + pixel / 2)
        assert values[-1].item() == pytest.approx(end - pixel / 2, abs=0.75 + pixel / 2)


def test_preprocessing_that_cannot_be() -> None:
    for given, message in (
        ((0, None, None), "size is 0; expected at least 1"),
        ((8, (0.0, float("nan"), 0.0), None), "mean is .*; expected numbers"),
        ((8, None, (1.0, 0.0, 1.0)), "std is .*; expected numbers above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_classifier("squeezenet1_1", "none", *given)


@pytest.mark.parametrize("size", [(5000, 1), (1, 60000)])
def test_pictures_of_which_next_to_nothing_would_be_seen(size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(256, 224, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels, and the model would see less"):
        preprocessing.crop(Image.new("RGB", size))
