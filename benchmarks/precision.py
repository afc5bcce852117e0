"""Times Score-CAM in bfloat16 and compiled against Score-CAM in float32, on this machine, in one run.

The modes take turns. For networks with trained weights each computes the exact map and the map within a tolerance. The
others score the 31 channels of their layer that vary most: with the unmasked input among them these are 32 rows, which
fill passes of any power of two. The time excludes compilation. Results go to the terminal and to benchmarks/results/.

    python -m benchmarks.precision --weights FOLDER

FOLDER holds the weights that benchmarks.networks names.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerActivation
from PIL import Image
from skimage.data import coffee
from torch import Tensor, nn
from torchvision.models import get_model

from benchmarks import accelerator, score_cam
from benchmarks.networks import IMAGENET_MEAN, IMAGENET_STD, preprocess
from captum_fusion import LayerScoreCam
from captum_fusion.metrics import saliency_map

RESULTS = Path(__file__).parent / "results" / "precision.md"
CHANNELS = 31
TOLERANCE = 0.05
MODES = ("float32", "bfloat16", "compiled", "compiled, bfloat16")
# Each network's layer.
MODELS = {name: score_cam.MODELS[name] for name in ("efficientnet-lite0", "mobilenet_v2", "resnet50", "vgg16")}
MODELS |= {"vit_b_16": "maps", "convnext_tiny": "features"}


class Probe(nn.Module):
    """Some channels of a feature map, as a layer of their own beside the network's path."""

    def __init__(self, channels: Tensor) -> None:
        super().__init__()
        self.channels, self.layer = channels, nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        self.layer(maps[:, self.channels])
        return maps


def load(name: str, weights: Path) -> tuple[nn.Module, Tensor]:
    """Builds a network and its input, a photograph or, for some networks with random weights, noise."""
    if name in score_cam.MODELS:
        model, _, image = score_cam.load(name, weights)
        return model, image
    image = preprocess(Image.fromarray(coffee()), 224, IMAGENET_MEAN, IMAGENET_STD)
    if name == "vit_b_16":
        return accelerator.load(name, weights)[0], image
    torch.manual_seed(0)
    return get_model(name, weights=None).eval(), image


def measure(name: str, weights: Path, turns: int) -> list[dict[str, Any]]:
    """Explains the photograph in each mode, turn by turn."""
    model, image = load(name, weights)
    # As a model comes: autocast converts weights once if they require gradients, else in every pass.
    model.requires_grad_(True)
    layer = model.get_submodule(MODELS[name])
    with torch.no_grad():
        target = int(model(image).argmax())
        lowest, highest = LayerActivation(model, layer).attribute(image)[0].flatten(1).aminmax(dim=1)
    probe = Probe((highest - lowest).topk(CHANNELS).indices)
    setattr(model, MODELS[name], nn.Sequential(layer, probe))
    compiled: Any = torch.compile(model, options={"freezing": True})

    def explain(mode: str, tolerance: float) -> tuple[Tensor, float, float]:
        explainer = LayerScoreCam(compiled if "compiled" in mode else model, explained, tolerance=tolerance)
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in mode):
            start = time.perf_counter()
            attributions, errors = explainer.attribute(image, target=target, return_error_estimate=True)
            seconds = time.perf_counter() - start
        return saliency_map(attributions, tuple(image.shape[2:])), float(errors), seconds

    trained = name in score_cam.TRAINED
    explained = layer if trained else probe.layer
    works = {"exact": 0.0, f"within {TOLERANCE}": TOLERANCE} if trained else {f"{CHANNELS + 1} passes": 0.0}
    rows = []
    exact, _, _ = explain("float32", 0.0)
    for work, tolerance in works.items():
        taken: dict[str, list[float]] = {mode: [] for mode in MODES}
        results: dict[str, dict[str, Any]] = {}
        # The first turn compiles.
        for turn in range(turns + 1):
            for mode in MODES:
                maps, estimate, seconds = explain(mode, tolerance)
                taken[mode] += [seconds] if turn else []
                error = float((maps - exact).abs().max())
                results[mode] = {"error": error, "estimate": estimate if tolerance else None}
        for mode, result in results.items():
            times = [theirs / ours for theirs, ours in zip(taken["float32"], taken[mode], strict=True)]
            rows.append({"model": name, "work": work, "mode": mode, "seconds": taken[mode], "times": times, **result})
    return rows


def line(row: dict[str, Any]) -> str:
    trained = "trained" if row["model"] in score_cam.TRAINED else "random"
    times, estimate = row["times"], row["estimate"]
    judged = ["-", "-"] if estimate is None else [f"{estimate:.3f}", "yes" if row["error"] <= TOLERANCE else "**no**"]
    cells = [row["model"], trained, row["work"], row["mode"], f"{statistics.median(row['seconds']):.2f}"]
    cells += [f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})", f"{row['error']:.4f}", *judged]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--weights", type=Path, default=Path(), help="the folder of the weights (default: this one)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    lines = [
        "# Score-CAM in reduced precision and compiled",
        "",
        f"{score_cam.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}. bfloat16 is by "
        "autocast; compiled is `torch.compile` with frozen weights, whose compilation is not in the seconds. The speed "
        "is the time in float32 divided by the time, median and range of the turns. The error is the largest "
        "difference from the exact final map in float32 (after ReLU and min-max), the estimate is that of Score-CAM, "
        f'and "within" compares the error with {TOLERANCE}. Networks with random weights score {CHANNELS} channels.',
        "",
        "| model | weights | work | mode | seconds | speed (range) | error | estimate | within |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name in arguments.models:
        for row in measure(name, arguments.weights, arguments.turns):
            lines.append(line(row))
            sys.stdout.write(f"{lines[-1]}\n")
            sys.stdout.flush()
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
