from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Small_Weights, get_model

from captum_fusion._models import Classifier, Preprocessing, find_layer, last_feature_map, load_classifier


def load(name: str | None, weights: str | None = "none") -> Classifier:
    return load_classifier(name, weights, None, None, None)


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


def test_state_dict_of_another_model(tmp_path: Path) -> None:
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt does not fit mobilenet_v3_small"):
        load("mobilenet_v3_small", str(tmp_path / "other.pt"))


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"epoch": 3}, []], ids=["pickled module", "numbers", "list"])
def test_weights_that_are_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt (is not a file of weights only|holds)"):
        load("mobilenet_v3_small", str(tmp_path / "bad.pt"))


def test_unknown_names_come_with_the_close_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no torchvision classifier 'resnet5'.*resnet50"):
        load("resnet5")
    with pytest.raises(ValueError, match=r"tests.conftest:Nothing cannot be imported"):
        load("tests.conftest:Nothing")
    with pytest.raises(ValueError, match="no_such_package:build cannot be imported"):
        load("no_such_package:build")
    with pytest.raises(TypeError, match=r"builtins:dict returned dict; expected a torch.nn.Module"):
        load("builtins:dict")
    with pytest.raises(FileNotFoundError):
        load("mobilenet_v3_small", str(tmp_path / "missing.pt"))


def test_targets() -> None:
    preprocessing = Preprocessing(8, 8, (0.0,), (1.0,))
    classifier = Classifier("birds", nn.Identity(), preprocessing, ("crane", "tabby", "Egyptian cat", "crane"))
    assert classifier.target("1", 4) == 1
    assert classifier.target("egyptian cat", 4) == 2
    with pytest.raises(ValueError, match=r"no category 'taby'. Close: tabby"):
        classifier.target("taby", 4)
    with pytest.raises(ValueError, match=r"categories \[0, 3\] are all named 'crane'"):
        classifier.target("crane", 4)
    with pytest.raises(ValueError, match="target is 4; expected an index below 4"):
        classifier.target("4", 4)
    with pytest.raises(ValueError, match="birds has no category names"):
        Classifier("birds", nn.Identity(), preprocessing, None).target("tabby", 4)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vgg11", "features"),
        ("resnet18", "layer4"),
        ("mobilenet_v2", "features"),
        ("densenet121", "features"),
        ("efficientnet_b0", "features"),
        ("convnext_tiny", "features"),
    ],
)
def test_last_feature_map(name: str, layer: str) -> None:
    model = get_model(name, weights=None).eval()
    assert last_feature_map(model, torch.rand(1, 3, 64, 64)) == layer
    assert not any(module._forward_hooks for module in model.modules())


def test_last_feature_map_of_a_module_that_runs_twice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(self.act(x))).mean((2, 3))

    assert last_feature_map(Net(), torch.rand(1, 3, 8, 8)) == "act"
    with pytest.raises(ValueError, match="No layer of the model gives a feature map"):
        last_feature_map(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2))


def test_find_layer() -> None:
    model = get_model("resnet18", weights=None)
    assert find_layer(model, "layer4.1.relu") is model.layer4[1].relu
    with pytest.raises(ValueError, match=r"no layer 'layer5'. Close: .*layer4"):
        find_layer(model, "layer5")
