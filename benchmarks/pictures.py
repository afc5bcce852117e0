"""Times Score-CAM of many pictures as one batch, one by one and with pytorch-grad-cam, on this machine, in one run.

EfficientNet-Lite0 has its ImageNet weights; mobilenet_v3_small, one of the smallest networks, has random ones. The
three take turns. Each explains the predicted class of every picture. The seconds are those of all pictures together.
Results go to the terminal and to benchmarks/results/.

    python -m benchmarks.pictures FOLDER

FOLDER holds photographs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model

from benchmarks import score_cam
from benchmarks.networks import IMAGENET_MEAN, IMAGENET_STD, preprocess
from captum_fusion import LayerScoreCam

RESULTS = Path(__file__).parent / "results" / "pictures.md"
TOLERANCE = 0.05
Work = Callable[[nn.Module, nn.Module, Tensor, Tensor], object]


def load(name: str) -> tuple[nn.Module, nn.Module]:
    """Builds the model and its layer."""
    if name == "efficientnet-lite0":
        model, layer, _ = score_cam.load(name, Path())
        return model, layer
    torch.manual_seed(0)
    model = get_model(name, weights=None).eval().requires_grad_(False)
    return model, model.get_submodule("features")


def as_batch(tolerance: float) -> Work:
    def work(model: nn.Module, layer: nn.Module, inputs: Tensor, targets: Tensor) -> object:
        return LayerScoreCam(model, layer, tolerance=tolerance).attribute(inputs, targets)

    return work


def one_by_one(explain: score_cam.Explainer) -> Work:
    def work(model: nn.Module, layer: nn.Module, inputs: Tensor, targets: Tensor) -> object:
        return [explain(model, layer, image[None], int(target)) for image, target in zip(inputs, targets, strict=True)]

    return work


def measure(name: str, files: list[Path], works: dict[str, Work], turns: int) -> list[str]:
    """Times the works turn by turn and formats a row for each."""
    model, layer = load(name)
    normalization = () if name == "efficientnet-lite0" else (IMAGENET_MEAN, IMAGENET_STD)
    inputs = torch.cat([preprocess(Image.open(file), 224, *normalization) for file in files])
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    seconds: dict[str, list[float]] = {label: [] for label in works}
    for _ in range(turns):
        for label, work in works.items():
            start = time.perf_counter()
            work(model, layer, inputs, targets)
            seconds[label].append(time.perf_counter() - start)
    rows = []
    first = next(iter(works))
    for label, times in seconds.items():
        relative = [own / batch for own, batch in zip(times, seconds[first], strict=True)]
        rows.append(
            f"| {name} | {len(files)} | {label} | {statistics.median(times):.1f} "
            f"| {len(files) / statistics.median(times):.2f} "
            f"| {statistics.median(relative):.2f} ({min(relative):.2f} to {max(relative):.2f}) |"
        )
        sys.stdout.write(rows[-1] + "\n")
    return rows


def main() -> None:
    """Measures both networks, exactly and within the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--dear", type=int, default=3, help="the pictures of exact Score-CAM of EfficientNet-Lite0")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    # The activations of random weights underflow, which slows passes down forty times.
    torch.set_flush_denormal(True)
    files = sorted(arguments.folder.glob("*.[jJ][pP]*[gG]"))[: arguments.pictures]
    exact = {
        "exact, one batch": as_batch(0.0),
        "exact, one by one": one_by_one(score_cam.within(0.0)),
        "exact, pytorch-grad-cam": one_by_one(score_cam.pytorch_grad_cam),
    }
    inferred = {
        f"within {TOLERANCE}, one batch": as_batch(TOLERANCE),
        f"within {TOLERANCE}, one by one": one_by_one(score_cam.within(TOLERANCE)),
    }
    rows = []
    for name, dear in (("mobilenet_v3_small", len(files)), ("efficientnet-lite0", arguments.dear)):
        rows += measure(name, files, inferred, arguments.turns)
        rows += measure(name, files[:dear], exact, arguments.turns)
    arguments.output.write_text(
        "# Score-CAM of many pictures\n\n"
        f"{score_cam.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}. mobilenet_v3_small "
        "has random weights. The last column divides the time by that of the batch, turn by turn: median and range.\n\n"
        "| model | pictures | work | seconds | pictures a second | times the batch |\n"
        "| --- | ---: | --- | ---: | ---: | ---: |\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
