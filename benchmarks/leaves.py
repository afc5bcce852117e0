r"""Trains four networks on photographs of rice leaves, and says how well they know leaves that they have never seen.

FOLDER is the collection as published: train/ and test/ with a folder for each disease, 220 photographs of each. Of
these 100 are photographs of their own, Disease_N. The others are those for training turned by 90 and 180 degrees, and
are left out, since training here turns pictures itself. Many of the 100 are neighbouring or overlapping parts of one
leaf, and the published split has such parts on both sides. The split made here keeps leaves apart:

- How alike two photographs of a disease are is the cosine of their embeddings: EfficientNet-Lite0's last feature map,
  averaged over its pixels and over the eight turns and flips of the photograph, less the mean of the disease.
- A group is what hangs together by pairs more alike than 0.65, or than 0.2 where one is numbered next to the other, as
  the parts of a leaf mostly are. Whole groups are drawn for testing. A photograph that is left and more alike than 0.5
  to one of those is used for nothing.

The thresholds were chosen by looking at pairs and groups, before any network was trained. Photographs of brown spot
that are more alike than 0.5 often show one leaf, also turned or warped, and from 0.65 on nearly always. Leaves of the
other two diseases lie on the same paper in the same light: there, also two leaves are often more alike than 0.65, which
does no harm. Parts of a leaf that look different and are not numbered in turn may remain on both sides.

Each network is trained twice by the same recipe: with leaves apart, which gives the weights, and on the published
split, for its claim. Nothing is chosen on test pictures: the recipes were tried on a part of the training leaves, and
the last weights are taken. OUTPUT gets split.json, test/ with the test photographs, and for each network NAME.pt, a
state dict, and NAME.json, its accuracy. A run that was interrupted goes on where it is started again: what has its
accuracy in NAME.json is not trained again. From the root of the checkout:

    python -m benchmarks.leaves FOLDER OUTPUT
    captum-fusion benchmark --images OUTPUT/test --labels-by-order --output RESULTS \
        --model benchmarks.leaves:resnet mobilenet_v2 --weights OUTPUT/resnet.pt OUTPUT/mobilenet_v2.pt
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import VGG, ResNet, get_model
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers
from torchvision.transforms import v2

from captum_fusion._app.models.classifier import Classifier
from captum_fusion._app.models.loading import load_classifier
from captum_fusion._app.models.preprocessing import Preprocessing
from captum_fusion._app.options import DEFAULT_MODEL
from captum_fusion._app.output_files import write_whole

ALIKE, NEIGHBOURS_ALIKE, TOO_ALIKE = 0.65, 0.2, 0.5
TESTED = 27  # Photographs of each disease at most.


class Photograph(NamedTuple):
    """A photograph that is no turned copy, and the part of the collection that it was published in."""

    file: Path
    disease: str
    number: int
    published: str


class Pictures(Dataset[tuple[Tensor, int]]):
    """Photographs in memory, of which each time another part is seen, turned, flipped, and in other colors.

    Args:
        photographs: The photographs.
        size: The pixels that a part is brought to, on each side.
        parts: The share of the photograph that is seen, at least and at most.
        colors: By how much brightness, contrast and saturation change; the hue by a tenth of it.
    """

    def __init__(self, photographs: Sequence[Photograph], size: int, parts: tuple[float, float], colors: float) -> None:
        diseases = sorted({photograph.disease for photograph in photographs})
        self.pixels = [read(photograph.file) for photograph in photographs]
        self.classes = [diseases.index(photograph.disease) for photograph in photographs]
        self.change = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=parts),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                v2.RandomApply([v2.RandomRotation((90, 90))]),
                v2.ColorJitter(colors, colors, colors, hue=colors / 10),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.change(self.pixels[index]), self.classes[index]


class Network(NamedTuple):
    """What --model takes, how the network starts, and how it is trained."""

    model: str
    start: Callable[[int], nn.Module]
    train: Callable[[nn.Module, Sequence[Photograph], Preprocessing], None]


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def read(file: Path) -> Tensor:
    with Image.open(file) as image:
        return v2.functional.pil_to_tensor(image.convert("RGB"))


def find(folder: Path) -> list[Photograph]:
    """The photographs by disease and number."""
    found = [
        Photograph(file, file.parent.name, int(name[1]), file.parent.parent.name)
        for file in folder.glob("t*/*/*")
        if (name := re.fullmatch(r"[A-Za-z]+_(\d+)", file.stem))
    ]
    if not found:
        raise SystemExit(f"{folder} has no photographs like train/Brownspot/Brownspot_30.jpg")
    return sorted(found, key=lambda photograph: (photograph.disease, photograph.number))


def likeness(photographs: Sequence[Photograph]) -> np.ndarray:
    """How alike each two photographs are, (N, N); -1 for those of two diseases."""
    classifier = load_classifier()
    model = classifier.model.to(memory_format=torch.channels_last)
    pooled: list[Tensor] = []
    hook = model.get_submodule("_avg_pooling").register_forward_hook(lambda _, __, output: pooled.append(output))
    with torch.no_grad():
        for photograph in photographs:
            pixels = v2.functional.resize(read(photograph.file)[None] / 255, [160, 160])
            turned = [torch.rot90(pixels, turns, (2, 3)) for turns in range(4)]
            rows = classifier.preprocessing.normalize(torch.cat([*turned, *(turn.flip(3) for turn in turned)]))
            model(rows.to(memory_format=torch.channels_last))
    hook.remove()
    embeddings = torch.stack([output.flatten(1).mean(0) for output in pooled]).double()
    same = of_one_disease(photographs)
    # A row's mean over those of its disease.
    embeddings -= torch.from_numpy(same / same.sum(1, keepdims=True)) @ embeddings
    embeddings = nn.functional.normalize(embeddings)
    return np.where(same, (embeddings @ embeddings.T).numpy(), -1)


def of_one_disease(photographs: Sequence[Photograph]) -> np.ndarray:
    diseases = np.array([photograph.disease for photograph in photographs])
    return diseases[:, None] == diseases


def split(photographs: Sequence[Photograph], alike: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The group of each photograph, and "train", "test" or "unused"."""
    numbers = np.array([photograph.number for photograph in photographs])
    neighbours = abs(numbers[:, None] - numbers) == 1
    groups = connected_components((alike > ALIKE) | (neighbours & (alike > NEIGHBOURS_ALIKE)))[1]
    diseases = np.array([photograph.disease for photograph in photographs])
    tested = np.zeros(len(photographs), dtype=bool)
    random = np.random.default_rng(seed)
    for disease in np.unique(diseases):
        for group in random.permutation(np.unique(groups[diseases == disease])):
            with_group = tested | (groups == group)
            if (with_group & (diseases == disease)).sum() <= TESTED:
                tested = with_group
    near = (alike > TOO_ALIKE)[:, tested].any(axis=1)
    return groups, np.select([tested, near], ["test", "unused"], "train")


def vgg(classes: int = 3) -> nn.Module:
    """VGG11 with batch normalization, a quarter as wide, and a head of one layer over the mean of its feature map."""
    layers: list[str | int] = [16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"]
    network = VGG(make_layers(layers, batch_norm=True), num_classes=classes)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Linear(128, classes)
    return network


def resnet(classes: int = 3) -> nn.Module:
    """ResNet18 with one block instead of two in each stage."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)


def mobilenet(classes: int) -> nn.Module:
    return get_model("mobilenet_v2", num_classes=classes)


def lite(classes: int) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights and a new head."""
    network = load_classifier(DEFAULT_MODEL).model
    network._fc = nn.Linear(network._fc.in_features, classes)
    return network


def fit(
    network: nn.Module, pictures: Pictures, preprocessing: Preprocessing, batch: int, epochs: int, rate: float
) -> None:
    """Trains the parameters that require gradients by AdamW, with a learning rate that rises and falls once."""
    loader = DataLoader(pictures, batch, shuffle=True, drop_last=True)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        total = 0.0
        for pixels, classes in loader:
            scores = network(preprocessing.normalize(pixels).to(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(scores, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        write(f"epoch {epoch + 1} of {epochs}, loss {total / len(loader):.3f}")


def from_scratch(network: nn.Module, photographs: Sequence[Photograph], preprocessing: Preprocessing) -> None:
    pictures = Pictures(photographs, 96, (0.15, 0.5), 0.1)
    fit(network.train(), pictures, preprocessing, batch=16, epochs=30, rate=1e-3)


def fine_tune(network: nn.Module, photographs: Sequence[Photograph], preprocessing: Preprocessing) -> None:
    """The head alone, then everything but the statistics of batch normalization."""
    pictures = Pictures(photographs, 128, (0.2, 0.5), 0.3)
    network.eval().requires_grad_(False)
    network.get_submodule("_fc").requires_grad_(True)
    fit(network, pictures, preprocessing, batch=8, epochs=10, rate=1e-2)
    fit(network.requires_grad_(True), pictures, preprocessing, batch=8, epochs=15, rate=2e-4)


NETWORKS = {
    "resnet": Network("benchmarks.leaves:resnet", resnet, from_scratch),
    "vgg": Network("benchmarks.leaves:vgg", vgg, from_scratch),
    "mobilenet_v2": Network("mobilenet_v2", mobilenet, from_scratch),
    DEFAULT_MODEL: Network(DEFAULT_MODEL, lite, fine_tune),
}


def trained(network: Network, photographs: Sequence[Photograph], seed: int, file: Path) -> Classifier:
    """Trains a network, saves its weights, and loads them as the command does."""
    torch.manual_seed(seed)
    classes = len({photograph.disease for photograph in photographs})
    model = network.start(classes).to(memory_format=torch.channels_last)
    network.train(model, photographs, load_classifier(network.model, "none").preprocessing)
    torch.save({name: entry.contiguous() for name, entry in model.state_dict().items()}, file)
    return load_classifier(network.model, str(file))


def predict(classifier: Classifier, photographs: Sequence[Photograph]) -> np.ndarray:
    predictions = []
    for photograph in photographs:
        with Image.open(photograph.file) as image:
            inputs = classifier.preprocessing.normalize(classifier.preprocessing.crop(image))
        predictions.append(int(classifier.scores(inputs).argmax()))
    return np.array(predictions)


def share(right: np.ndarray) -> dict[str, Any]:
    """A share with its 95 % interval by Wilson."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return {
        "right": int(right.sum()),
        "of": len(right),
        "share": round(float(right.mean()), 4),
        "interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
    }


def judge(classifier: Classifier, photographs: Sequence[Photograph], groups: np.ndarray) -> dict[str, Any]:
    """How well a network knows some photographs.

    The interval over photographs takes them for independent, which those of one group are not; that over groups, where
    a group is right if all of it is, does not.
    """
    diseases = sorted({photograph.disease for photograph in photographs})
    classes = np.array([diseases.index(photograph.disease) for photograph in photographs])
    predictions = predict(classifier, photographs)
    right = predictions == classes
    confusion = np.zeros((len(diseases), len(diseases)), dtype=int)
    np.add.at(confusion, (classes, predictions), 1)
    return {
        "photographs": share(right),
        "groups": share(np.array([right[groups == group].all() for group in np.unique(groups)])),
        # A row for each disease, a column for each prediction.
        "confusion": confusion.tolist(),
        "wrong": {photographs[index].file.name: diseases[predictions[index]] for index in np.flatnonzero(~right)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, help="a new folder, or that of a run that goes on")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    photographs = find(arguments.folder)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(True)
    groups, parts = split(photographs, likeness(photographs), arguments.seed)
    rows = [
        {"photograph": photograph.file.name, "disease": photograph.disease, "group": int(group), "part": str(part)}
        for photograph, group, part in zip(photographs, groups, parts, strict=True)
    ]
    text = json.dumps({"seed": arguments.seed, "photographs": rows}, indent=1)
    before = arguments.output / "split.json"
    if before.exists() and before.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{before} has another split; expected a new folder, or that of a run with this split")
    write_whole(before, text)
    for photograph, part in zip(photographs, parts, strict=True):
        if part == "test":
            place = arguments.output / "test" / photograph.disease
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(photograph.file, place)

    published = np.array([photograph.published for photograph in photographs])
    files = {name: arguments.output / f"{name}.json" for name in arguments.networks}
    records: dict[str, dict[str, Any]] = {
        name: json.loads(file.read_text(encoding="utf-8"))
        if file.exists()
        else {"model": NETWORKS[name].model, "seed": arguments.seed}
        for name, file in files.items()
    }
    for title, sides, suffix in (("leaves apart", parts, ".pt"), ("published split", published, "-published.pt")):
        learnt, asked = (np.flatnonzero(sides == part) for part in ("train", "test"))
        for name, record in records.items():
            if title in record:
                continue
            start = time.perf_counter()
            file = arguments.output / (name + suffix)
            classifier = trained(NETWORKS[name], [photographs[index] for index in learnt], arguments.seed, file)
            record[title] = {
                "trained on": len(learnt),
                **judge(classifier, [photographs[index] for index in asked], groups[asked]),
            }
            write_whole(files[name], json.dumps(record, indent=1))
            seconds = time.perf_counter() - start
            write(f"{title}, {name}: {record[title]['photographs']}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
