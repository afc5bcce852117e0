"""Compares attributions with a known truth: generated pictures whose deciding pixels are known exactly.

A picture shows up to four shapes over a texture. A disk, a triangle, or a cross and a ring together decide its class;
squares, bars, and a cross or a ring alone do not, and without a deciding shape the class is the fourth, "none". A small
convolutional network learns this from fixed seeds. Two checks make sure that the truth is the network's own: its
accuracy on new pictures, and how often its answer turns to "none" where the picture is drawn again without a deciding
shape. Then each method of captum_fusion.attr that explains a layer, Grad-CAM and two controls explain the true class at
the last and at an earlier layer. Their maps are compared with the mask of the deciding shapes:

- energy inside: the share of the map's sum inside the mask, the area of the mask by chance
- rank correlation: Spearman's, over all pixels
- IoU: intersection over union of the mask and the map above a threshold, the best one for each picture

The row "truth" is the mask at the layer's resolution, interpolated as the maps are: a bound on what a layer can show.
Ten minutes on two cores at most. OUTPUT takes a csv for each seed, so that an interrupted run resumes.

    python -m benchmarks.truth OUTPUT
"""

import argparse
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from captum.attr import LayerAttribution, LayerGradCam
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from captum_fusion import attr
from captum_fusion.metrics import energy_pointing_game, saliency_map

RESULTS = Path(__file__).parent / "results"
SIZE = 64
CLASSES = ("disk", "triangle", "cross and ring", "none")
NONE = 3
DECIDING = (("disk",), ("triangle",), ("cross", "ring"), ())
DISTRACTORS = ("square", "bar", "cross", "ring")
LAYERS = ("last", "earlier")
TRUTH, CONTROLS = "truth", ("random map", "centred Gaussian")
DRAWN = ("LayerGradCam", "LayerScoreCam", "LayerUnionCam", "LayerFusionCam", "LayerLayerCam")
MEASURES = ["energy inside", "rank correlation", "IoU"]
CHECKS = ["accuracy", "turned to none"]

SHAPES: dict[str, Callable[[Any, Any], Any]] = {
    "disk": lambda u, v: u**2 + v**2 <= 1,
    "ring": lambda u, v: abs(u**2 + v**2 - 0.65) <= 0.35,
    "triangle": lambda u, v: (v <= 0.6) & (2 * abs(u) <= v + 1),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.8,
    "bar": lambda u, v: (abs(u) <= 1) & (abs(v) <= 0.3),
    "cross": lambda u, v: np.minimum(abs(u), abs(v)) + 10 * (np.maximum(abs(u), abs(v)) > 1) <= 0.3,
}


class Pictures(NamedTuple):
    """Pictures, (N, 3, S, S), their classes and deciding pixels, (N, S, S), and copies without a deciding shape."""

    pixels: Tensor
    classes: Tensor
    masks: Tensor
    occluded: Tensor


def generate(count: int, seed: int) -> Pictures:
    """Draws pictures of the classes in turn."""
    random = np.random.default_rng(seed)
    classes = np.arange(count) % len(CLASSES)
    pictures = [_picture(DECIDING[each], random) for each in classes]
    pixels, masks, occluded = (torch.from_numpy(np.stack(part)) for part in zip(*pictures, strict=True))
    return Pictures(pixels - 0.5, torch.from_numpy(classes), masks, occluded - 0.5)


def _picture(deciding: Sequence[str], random: np.random.Generator) -> tuple[Any, Any, Any]:
    """Draws a picture, (3, S, S) in [0, 1], its mask, and a copy without one of its deciding shapes."""
    # A cross and a ring together would decide.
    either = ("square", "bar", *random.permutation(DISTRACTORS[2:])[:1])
    distractors = random.choice(either if len(deciding) < 2 else DISTRACTORS[:2], random.integers(0, 3))
    names = [*deciding, *distractors]
    left_out = random.choice(deciding) if deciding else None
    picture = _texture(random)
    occluded, mask = picture.copy(), np.zeros((SIZE, SIZE), dtype=bool)
    for name, cell in zip(names, random.permutation(4), strict=False):
        radius = random.uniform(8, 12)
        x, y = (16 + 32 * place + random.uniform(-3, 3) for place in divmod(cell, 2))
        angle = random.uniform(-0.3, 0.3)
        rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
        across, down = (columns - x) / radius, (rows - y) / radius
        turned = np.cos(angle) * across + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * across
        inside = SHAPES[name](*turned)
        contrast = random.normal(size=3)
        colour = picture.mean(axis=(1, 2)) + 0.4 * contrast / np.linalg.norm(contrast)
        shape = np.clip(colour[:, None, None] + random.normal(0, 0.03, picture.shape), 0, 1)
        picture = np.where(inside, shape, picture)
        if name != left_out:
            occluded = np.where(inside, shape, occluded)
        if name in deciding:
            mask |= inside
    return picture.astype(np.float32), mask, occluded.astype(np.float32)


def _texture(random: np.random.Generator) -> Any:
    """Draws gratings and noise over a colour, (3, S, S)."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    picture = random.uniform(0.3, 0.7, 3)[:, None, None] + random.normal(0, 0.04, (3, SIZE, SIZE))
    for _ in range(3):
        angle, frequency, phase = random.uniform(0, np.pi), random.uniform(0.1, 0.8), random.uniform(0, 2 * np.pi)
        wave = np.sin(frequency * (np.cos(angle) * columns + np.sin(angle) * rows) + phase)
        picture = picture + random.normal(0, 0.06, 3)[:, None, None] * wave
    return np.clip(picture, 0, 1)


def train(seed: int, pictures: int, epochs: int) -> nn.Module:
    """Trains a network of five convolutions from a seed."""
    torch.manual_seed(seed)

    def block(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())

    layers = {"stem": block(3, 16, 5, 2), "pool": nn.MaxPool2d(2), "widen": block(16, 32), "earlier": block(32, 32)}
    layers |= {"shrink": nn.MaxPool2d(2), "deepen": block(32, 48), "last": block(48, 48)}
    layers |= {"mean": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(48, len(CLASSES))}
    model = nn.Sequential(OrderedDict(layers))
    data = generate(pictures, 1000 + seed)
    decided = data.classes < NONE
    # Copies without a deciding shape are of the class "none".
    pixels = torch.cat([data.pixels, data.occluded[decided]])
    classes = torch.cat([data.classes, torch.full((int(decided.sum()),), NONE)])
    optimizer = torch.optim.AdamW(model.parameters())
    steps = epochs * (len(pixels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(pixels)), 64)[: len(pixels) // 64]:
            inputs = pixels[rows].flip(3) if torch.rand(()) < 0.5 else pixels[rows]
            loss = cross_entropy(model(inputs), classes[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def check(model: nn.Module, data: Pictures) -> dict[str, float]:
    """Computes the accuracy, and how often a deciding shape's absence turns the answer to "none"."""
    with torch.no_grad():
        right, without = (model(pixels).argmax(dim=1) for pixels in (data.pixels, data.occluded))
    right = right == data.classes
    turned = without[right & (data.classes < NONE)] == NONE
    return {"accuracy": right.float().mean().item(), "turned to none": turned.float().mean().item()}


def explain(model: nn.Module, layer: nn.Module, data: Pictures) -> dict[str, Tensor]:
    """Computes the map of each method, (N, 1, S, S)."""
    methods: list[type[Any]] = [LayerGradCam, *(each for each in attr.METHODS if issubclass(each, LayerAttribution))]
    maps: dict[str, Tensor] = {}
    for method in methods:
        attributions = method(model, layer).attribute(data.pixels, target=data.classes)
        maps[method.__name__] = saliency_map(attributions, (SIZE, SIZE))
    shape = LayerGradCam(model, layer).attribute(data.pixels, target=data.classes).shape
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    maps[CONTROLS[0]] = saliency_map(noise, (SIZE, SIZE))
    squares = (torch.linspace(-2, 2, SIZE) ** 2) / 2
    maps[CONTROLS[1]] = (-squares[:, None] - squares).exp().expand(len(noise), 1, SIZE, SIZE)
    maps[TRUTH] = saliency_map(adaptive_avg_pool2d(data.masks[:, None].float(), shape[2:]), (SIZE, SIZE))
    return maps


def best_overlap(saliency: Tensor, mask: Tensor) -> float:
    """Computes the intersection over union at the best threshold of the map."""
    values, order = saliency.flatten().sort(descending=True)
    hits = mask.flatten()[order].cumsum(0)
    overlaps = hits / (mask.sum() + torch.arange(1, len(order) + 1) - hits)
    # Pixels of one value lie on one side of a threshold.
    ends = torch.cat([values[1:] < values[:-1], torch.tensor([True])])
    return float(overlaps[ends].max())


def compare(maps: Tensor, masks: Tensor) -> dict[str, float]:
    """Computes the means of the measures over pictures."""
    pairs = list(zip(maps[:, 0], masks, strict=True))
    ranks = [spearmanr(each.flatten(), mask.flatten()).statistic if each.std() > 0 else 0.0 for each, mask in pairs]
    overlaps = [best_overlap(each, mask) for each, mask in pairs]
    energy = energy_pointing_game(maps, masks)
    return dict(zip(MEASURES, (float(energy.mean()), float(np.mean(ranks)), float(np.mean(overlaps))), strict=True))


def correct(model: nn.Module, data: Pictures, count: int) -> Pictures:
    """Selects pictures with deciding shapes that the network classifies correctly."""
    with torch.no_grad():
        right = model(data.pixels).argmax(dim=1) == data.classes
    rows = (right & (data.classes < NONE)).nonzero().flatten()[:count]
    return Pictures(*(part[rows] for part in data))


def measure(seed: int, arguments: argparse.Namespace) -> tuple[pd.DataFrame, Figure]:
    """Trains a network, checks it, compares every method at both layers, and draws some of the maps."""
    start = time.perf_counter(), time.process_time()
    model = train(seed, arguments.training, arguments.epochs)
    checks = check(model, generate(1000, 2000 + seed))
    sys.stdout.write(f"seed {seed}: trained in {time.process_time() - start[1]:.0f} s of a processor, {checks}\n")
    sys.stdout.flush()
    data = correct(model, generate(2 * arguments.pictures, 3000 + seed), arguments.pictures)
    weighting = signature(attr.LayerFusionCam.attribute).parameters["weighting"].default
    rows, maps = [], {}
    for layer in LAYERS:
        maps[layer] = explain(model, model.get_submodule(layer), data)
        for method, each in maps[layer].items():
            row = {"method": method, "layer": layer, "seed": seed, "pictures": len(data.pixels)}
            rows.append(row | compare(each, data.masks) | checks | {"weighting": weighting})
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    sys.stdout.write(f"seed {seed}: {seconds[0]:.0f} s, {seconds[1]:.0f} s of a processor\n")
    return pd.DataFrame(rows), draw(data, maps)


def draw(data: Pictures, maps: dict[str, dict[str, Tensor]]) -> Figure:
    """Draws a picture of each class with its deciding pixels outlined, and maps of some methods at both layers."""
    columns = [(layer, method) for layer in LAYERS for method in DRAWN]
    figure = Figure(figsize=(1.1 * (1 + len(columns)), 3.8), layout="constrained")
    grid = figure.subplots(NONE, 1 + len(columns))
    for line, wanted in zip(grid, range(NONE), strict=True):
        index = int((data.classes == wanted).nonzero()[0])
        pixels = (data.pixels[index] + 0.5).permute(1, 2, 0)
        line[0].imshow(pixels)
        line[0].set_title(CLASSES[wanted], size=7)
        for axis, (layer, method) in zip(line[1:], columns, strict=True):
            axis.imshow(maps[layer][method][index, 0], vmin=0, vmax=1)
            axis.set_title(f"{method.removeprefix('Layer')}\n{layer}", size=7)
        for axis in line:
            axis.contour(data.masks[index].float(), [0.5], colors="red", linewidths=0.7)
            axis.axis("off")
    return figure


def table(values: pd.DataFrame) -> str:
    """Formats means and standard deviations over the seeds, the most energy inside at the last layer first."""
    grouped = values.groupby(["method", "layer"])[MEASURES]
    means, spreads = grouped.mean(), grouped.std()
    heads = [f"{measure}, {layer}" for layer in LAYERS for measure in MEASURES]
    lines = [f"| method | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for method in means["energy inside"].xs("last", level="layer").sort_values(ascending=False).index:
        places = [((method, layer), measure) for layer in LAYERS for measure in MEASURES]
        cells = [f"{means.loc[place]:.2f} ± {spreads.loc[place]:.2f}" for place in places]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(values: pd.DataFrame) -> str:
    """Formats the page: what was done, the checks, and the table."""
    seeds = values.groupby("seed")[[*CHECKS, "pictures"]].first()
    accuracy, turned = (", ".join(f"{100 * value:.1f} %" for value in seeds[name]) for name in CHECKS)
    return f"""# Attributions against a known truth

Generated pictures of 64 x 64 pixels show up to four shapes over a texture. A disk, a triangle, or a cross and a ring
together decide the class; squares, bars, and a cross or a ring alone do not. The deciding pixels are therefore known
exactly. Small convolutional networks learn the classes, one network for each of {len(seeds)} seeds.

- Accuracy on 1000 new pictures: {accuracy}.
- Share of correctly classified pictures whose class changes to "none" without a deciding shape: {turned}.

Each network explains {seeds["pictures"].iloc[0]} pictures that it classifies correctly, at its last layer (8 x 8) and
at an earlier one (16 x 16). A measure is averaged over the pictures; the table has its mean and standard deviation
over the seeds. Every method has its default settings; Fusion-CAM's weighting is "{values["weighting"].iloc[0]}".

- Energy inside is the share of a map's sum inside the deciding pixels.
- Rank correlation is Spearman's, over all pixels.
- IoU is intersection over union with the deciding pixels, at the best threshold of each map.
- "{TRUTH}" is the mask of the deciding pixels at the layer's resolution, a bound on what a layer can show.
  "{CONTROLS[0]}" and "{CONTROLS[1]}" ignore the network.

{table(values)}

![Maps of some methods for a picture of each class, the deciding pixels outlined](truth.png)

[truth.csv](truth.csv) has each seed. To repeat it: `python -m benchmarks.truth OUTPUT`, or `make evidence` without
folders.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the seeds that OUTPUT lacks, and writes the page, its table and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the page goes. Default: the committed one")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=24, help="to explain, for each seed")
    parser.add_argument("--training", type=int, default=2400, help="pictures to train on")
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args(arguments)
    for folder in (given.output, given.results):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        file = given.output / f"seed-{seed}.csv"
        if not file.exists():
            rows, figure = measure(seed, given)
            if seed == given.seeds[0]:
                figure.savefig(given.results / "truth.png", dpi=80)
            rows.to_csv(file, index=False)
    values = pd.concat([pd.read_csv(given.output / f"seed-{seed}.csv") for seed in given.seeds])
    values.to_csv(given.results / "truth.csv", index=False, float_format="%.4f")
    (given.results / "truth.md").write_text(page(values))


if __name__ == "__main__":
    main()
