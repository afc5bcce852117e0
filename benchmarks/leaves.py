r"""Trains five networks on photographs of rice leaves and measures their accuracy on unseen leaves.

FOLDER is the collection as published: train/ and test/ with a folder for each disease, 220 photographs of each. Only
100 of them are originals, Disease_N; the others are training photographs rotated by 90 and 180 degrees, which are left
out, since training here rotates pictures itself. Many of the 100 show neighbouring or overlapping parts of one leaf,
and the published split has such parts on both sides. The split here keeps leaves apart:

- The similarity of two photographs of a disease is the cosine of their embeddings: EfficientNet-Lite0's last feature
  map, averaged over its pixels and over the eight rotations and flips of the photograph, less the mean of the disease.
- A group is a connected component of pairs with a similarity above 0.65, or above 0.2 where their numbers are
  consecutive, as those of the parts of a leaf mostly are. Whole groups are drawn for testing. A remaining photograph
  with a similarity above 0.5 to one of those is not used.

The thresholds were chosen by looking at pairs and groups, before any network was trained. Photographs of brown spot
with a similarity above 0.5 often show one leaf, also rotated or warped, and from 0.65 on nearly always. Leaves of the
other two diseases lie on the same paper in the same light: there, also two leaves often exceed 0.65, which does no
harm. Parts of a leaf that look different and are not numbered consecutively may remain on both sides.

Each network is trained twice by the same recipe: with leaves apart, which gives the weights, and on the published
split, for its claim. Test pictures decide nothing: the recipes were tried on a part of the training leaves, and the
last weights are taken. OUTPUT gets split.json, test/ with the test photographs, and for each network NAME.pt, a state
dict, and NAME.json, its accuracy. An interrupted run resumes: what has its accuracy in NAME.json is not trained again.
The network vgg16 has ImageNet convolutions, which stay frozen; --weights names the folder with vgg16_features.pt, and
without it vgg16 is left out. From the root of the checkout:

    python -m benchmarks.leaves FOLDER OUTPUT --weights WEIGHTS
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
from functools import partial
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

from benchmarks.networks import HALF, IMAGENET_MEAN, IMAGENET_STD, lite, vgg16
from captum_fusion.explain import Explainer

Array = np.ndarray[Any, Any]
LITE = "efficientnet-lite0"
ALIKE, NEIGHBOURS_ALIKE, TOO_ALIKE = 0.65, 0.2, 0.5
TESTED = 27  # Photographs of each disease at most.


class Photograph(NamedTuple):
    """An original photograph, and the part of the collection that it was published in."""

    file: Path
    disease: str
    number: int
    published: str


class Pictures(Dataset[tuple[Tensor, int]]):
    """Photographs in memory; each access crops, rotates, flips and recolors one at random.

    Args:
        photographs: The photographs.
        size: The pixels of the crop, on each side.
        parts: The share of the photograph in the crop, at least and at most.
        colors: The range of brightness, contrast and saturation; that of the hue is a tenth of it.
        mean, std: The normalization.
    """

    def __init__(
        self,
        photographs: Sequence[Photograph],
        size: int,
        parts: tuple[float, float],
        colors: float,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
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
                v2.Normalize(list(mean), list(std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels: Tensor = self.change(self.pixels[index])
        return pixels, self.classes[index]


class Network(NamedTuple):
    """The network's name for the command's --model, its builder, and its training."""

    model: str
    build: Callable[[int], nn.Module]
    train: Callable[[nn.Module, Sequence[Photograph]], None]


def log(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def write(file: Path, record: Any) -> None:
    """Writes a JSON file that is never half-written."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
    unfinished.replace(file)


def read(file: Path) -> Tensor:
    with Image.open(file) as image:
        pixels: Tensor = v2.functional.pil_to_tensor(image.convert("RGB"))
    return pixels


def find(folder: Path) -> list[Photograph]:
    """Finds the photographs, in the order of disease and number."""
    photographs = [
        Photograph(file, file.parent.name, int(name[1]), file.parent.parent.name)
        for file in folder.glob("t*/*/*")
        if (name := re.fullmatch(r"[A-Za-z]+_(\d+)", file.stem))
    ]
    if not photographs:
        raise SystemExit(f"{folder} has no photographs like train/Brownspot/Brownspot_30.jpg")
    return sorted(photographs, key=lambda photograph: (photograph.disease, photograph.number))


def similarity(photographs: Sequence[Photograph]) -> Array:
    """Computes the similarity of each two photographs, (N, N); -1 for those of two diseases."""
    model = lite().to(memory_format=torch.channels_last)
    pooled: list[Tensor] = []
    hook = model.get_submodule("_avg_pooling").register_forward_hook(lambda _, __, output: pooled.append(output))
    with torch.no_grad():
        for photograph in photographs:
            pixels = v2.functional.resize(read(photograph.file)[None] / 255, [160, 160])
            rotated = [torch.rot90(pixels, turns, (2, 3)) for turns in range(4)]
            rows = 2 * torch.cat([*rotated, *(each.flip(3) for each in rotated)]) - 1
            model(rows.to(memory_format=torch.channels_last))
    hook.remove()
    embeddings = torch.stack([output.flatten(1).mean(0) for output in pooled]).double()
    diseases = np.array([photograph.disease for photograph in photographs])
    same = diseases[:, None] == diseases
    embeddings -= torch.from_numpy(same / same.sum(1, keepdims=True)) @ embeddings
    embeddings = nn.functional.normalize(embeddings)
    return np.where(same, (embeddings @ embeddings.T).numpy(), -1)


def split(photographs: Sequence[Photograph], alike: Array, seed: int) -> tuple[Array, Array]:
    """Assigns each photograph its group, and "train", "test" or "unused"."""
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
    network: nn.Module = VGG(make_layers(layers, batch_norm=True), num_classes=classes)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Linear(128, classes)
    return network


def resnet(classes: int = 3) -> nn.Module:
    """ResNet18 with one block instead of two in each stage."""
    network: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    return network


def mobilenet(classes: int) -> nn.Module:
    network: nn.Module = get_model("mobilenet_v2", num_classes=classes)
    return network


def fine_tuned_lite(classes: int) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights and a new head."""
    network = lite()
    network._fc = nn.Linear(1280, classes)
    return network


def fit(network: nn.Module, pictures: Pictures, batch: int, epochs: int, rate: float) -> None:
    """Trains the parameters that require gradients by AdamW, with one cycle of the learning rate."""
    loader = DataLoader(pictures, batch, shuffle=True, drop_last=True)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        total = 0.0
        for pixels, classes in loader:
            scores = network(pixels.to(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(scores, classes)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        log(f"epoch {epoch + 1} of {epochs}, loss {total / len(loader):.3f}")


def from_scratch(network: nn.Module, photographs: Sequence[Photograph]) -> None:
    fit(network.train(), Pictures(photographs, 96, (0.15, 0.5), 0.1), batch=16, epochs=30, rate=1e-3)


def fine_tune(network: nn.Module, photographs: Sequence[Photograph]) -> None:
    """Trains the head alone, then everything but the statistics of batch normalization."""
    pictures = Pictures(photographs, 128, (0.2, 0.5), 0.3, HALF, HALF)
    network.eval().requires_grad_(False)
    network.get_submodule("_fc").requires_grad_(True)
    fit(network, pictures, batch=8, epochs=10, rate=1e-2)
    fit(network.requires_grad_(True), pictures, batch=8, epochs=15, rate=2e-4)


def train_head(network: nn.Module, photographs: Sequence[Photograph]) -> None:
    """Trains the head above frozen convolutions."""
    network.eval().requires_grad_(False)
    network.get_submodule("classifier").requires_grad_(True)
    fit(network, Pictures(photographs, 128, (0.2, 0.5), 0.3), batch=8, epochs=10, rate=1e-2)


NETWORKS = {
    "resnet": Network("benchmarks.leaves:resnet", resnet, from_scratch),
    "vgg": Network("benchmarks.leaves:vgg", vgg, from_scratch),
    "mobilenet_v2": Network("mobilenet_v2", mobilenet, from_scratch),
    LITE: Network(LITE, fine_tuned_lite, fine_tune),
    "vgg16": Network("benchmarks.networks:vgg16", vgg16, train_head),
}


def train(network: Network, photographs: Sequence[Photograph], seed: int, file: Path) -> Explainer:
    """Trains a network, saves its weights, and loads them as the command does."""
    torch.manual_seed(seed)
    model = network.build(len({photograph.disease for photograph in photographs}))
    network.train(model.to(memory_format=torch.channels_last), photographs)
    torch.save({name: entry.contiguous() for name, entry in model.state_dict().items()}, file)
    return Explainer(network.model, weights=str(file))


def share(right: Array) -> dict[str, Any]:
    """Computes a share with its 95 % interval by Wilson."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return {
        "right": int(right.sum()),
        "of": len(right),
        "share": round(float(right.mean()), 4),
        "interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
    }


def evaluate(explainer: Explainer, photographs: Sequence[Photograph], groups: Array) -> dict[str, Any]:
    """Computes a network's accuracy.

    The interval over photographs assumes that they are independent, which those of one group are not; the interval over
    groups does not, where a group is right if all of its photographs are.
    """
    diseases = sorted({photograph.disease for photograph in photographs})
    classes = np.array([diseases.index(photograph.disease) for photograph in photographs])
    opened = [explainer.open(photograph.file).prediction for photograph in photographs]
    predictions = np.array([int(prediction.probabilities.argmax()) for prediction in opened])
    right = predictions == classes
    confusion = np.zeros((len(diseases), len(diseases)), dtype=int)
    np.add.at(confusion, (classes, predictions), 1)
    return {
        "photographs": share(right),
        "groups": share(np.array([right[groups == group].all() for group in np.unique(groups)])),
        # A row for each disease, a column for each prediction.
        "confusion": confusion.tolist(),
        "wrong": {
            photographs[index].file.name: diseases[predictions[index]] for index in np.flatnonzero(~right).tolist()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, help="a new folder, or that of an interrupted run")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--weights", type=Path, help="the folder with vgg16_features.pt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    photographs = find(arguments.folder)
    arguments.output.mkdir(parents=True, exist_ok=True)
    networks = {name: NETWORKS[name] for name in arguments.networks}
    if "vgg16" in networks and arguments.weights is not None:
        build = partial(vgg16, features=arguments.weights / "vgg16_features.pt")
        networks["vgg16"] = networks["vgg16"]._replace(build=build)
    else:
        networks.pop("vgg16", None)
    torch.use_deterministic_algorithms(True)
    groups, parts = split(photographs, similarity(photographs), arguments.seed)
    rows = [
        {"photograph": photograph.file.name, "disease": photograph.disease, "group": int(group), "part": str(part)}
        for photograph, group, part in zip(photographs, groups, parts, strict=True)
    ]
    record = {"seed": arguments.seed, "photographs": rows}
    file = arguments.output / "split.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != record:
        raise SystemExit(f"{file} has another split; expected a new folder, or that of a run with this split")
    write(file, record)
    for photograph, part in zip(photographs, parts, strict=True):
        if part == "test":
            folder = arguments.output / "test" / photograph.disease
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(photograph.file, folder)

    published = np.array([photograph.published for photograph in photographs])
    for title, sides, suffix in (("leaves apart", parts, ".pt"), ("published split", published, "-published.pt")):
        training, testing = (np.flatnonzero(sides == part) for part in ("train", "test"))
        for name, network in networks.items():
            file = arguments.output / f"{name}.json"
            record = {"model": network.model, "seed": arguments.seed}
            if file.exists():
                record = json.loads(file.read_text(encoding="utf-8"))
            if title in record:
                continue
            start = time.perf_counter()
            weights = arguments.output / (name + suffix)
            explainer = train(network, [photographs[index] for index in training.tolist()], arguments.seed, weights)
            accuracy = evaluate(explainer, [photographs[index] for index in testing.tolist()], groups[testing])
            write(file, record | {title: {"trained on": len(training), **accuracy}})
            log(f"{title}, {name}: {accuracy['photographs']}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
