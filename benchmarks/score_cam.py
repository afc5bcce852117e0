"""Times Score-CAM against its peers, on this machine, in one run.

Each measurement runs in its own process, so that no implementation inherits another's memory or caches. The
implementations take turns, repeat by repeat, so that a machine whose speed drifts is fair to all. A process reports the
time of one picture after a warm-up, the memory that it took, and the map. Results go to the terminal and to
benchmarks/results/.

    python -m benchmarks.score_cam --repeats 3 --weights FOLDER

FOLDER holds the weights that benchmarks.networks names.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerActivation
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import get_model

from benchmarks.networks import IMAGENET_MEAN, IMAGENET_STD, lite, mobilenet_v2, preprocess, squeezenet
from captum_fusion import LayerScoreCam

RESULTS = Path(__file__).parent / "results"
# Each network's layer: the last convolutional map, after its activation.
MODELS = {
    "efficientnet-lite0": "features",
    "mobilenet_v2": "bn2",
    "squeezenet1_0": "features",
    "vgg16": "features",
    "resnet50": "layer4",
}
# The other networks have seeded random weights, and their input is noise.
TRAINED = ("efficientnet-lite0", "mobilenet_v2", "squeezenet1_0")
OURS = "captum-fusion"
CLASSES = 5
Explainer = Callable[[nn.Module, nn.Module, Tensor, int], Tensor]


class Features(nn.Module):
    """EfficientNet-Lite0 up to its activated head, as one module that every implementation can hook."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.extract_features(x)  # type: ignore[operator]
        return features


def load(name: str, weights: Path) -> tuple[nn.Module, nn.Module, Tensor]:
    """Builds the model, its layer and an input: a photograph for trained weights, noise for random ones."""
    if name in TRAINED:
        from PIL import Image
        from skimage.data import coffee

        photograph = Image.fromarray(coffee())
    if name == "efficientnet-lite0":
        network: Any = lite()
        parts = {"features": Features(network), "pool": network._avg_pooling, "flatten": nn.Flatten()}
        model: nn.Module = nn.Sequential(OrderedDict(parts | {"head": network._fc})).eval()
        image = preprocess(photograph, 224)
    elif name in TRAINED:
        model = {"mobilenet_v2": mobilenet_v2, "squeezenet1_0": squeezenet}[name]()
        model.load_state_dict(torch.load(weights / f"{name}.pt", weights_only=True))
        model.eval()
        image = preprocess(photograph, 224, IMAGENET_MEAN, IMAGENET_STD)
    else:
        torch.manual_seed(0)
        model = get_model(name, weights=None).eval()
        image = torch.randn(1, 3, 224, 224)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, model.get_submodule(MODELS[name]), image


def captum_fusion(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    return within(0.0)(model, layer, image, target)


def within(tolerance: float) -> Explainer:
    def explain(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
        score_cam = LayerScoreCam(model, layer, tolerance=tolerance)
        attributions: Tensor = score_cam.attribute(image, target=target, relu_attributions=True)
        return attributions

    return explain


def several_classes(tolerance: float) -> Explainer:
    """Explains the target and the classes after it for one picture."""

    def explain(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
        score_cam = LayerScoreCam(model, layer, tolerance=tolerance)
        targets = [(target + step) % 1000 for step in range(CLASSES)]
        images = image.expand(CLASSES, -1, -1, -1)
        attributions: Tensor = score_cam.attribute(images, target=targets, relu_attributions=True)
        return attributions[:1]

    return explain


def pytorch_grad_cam(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    from pytorch_grad_cam import ScoreCAM  # type: ignore[import-untyped]
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # type: ignore[import-untyped]

    with ScoreCAM(model, [layer]) as cam:
        return torch.from_numpy(cam(image, [ClassifierOutputTarget(target)])).unsqueeze(1)


def torchcam(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    from torchcam.methods import ScoreCAM

    with ScoreCAM(model, layer) as cam, torch.inference_mode():
        model(image)
        activations = LayerActivation(model, layer).attribute(image)
        attributions: Tensor = cam(target)[0].reshape(1, 1, *activations.shape[2:])
    return attributions


def one_by_one(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    activations: Tensor = LayerActivation(model, layer).attribute(image).detach()
    with torch.no_grad():
        masks = interpolate(activations, image.shape[2:], mode="bilinear")
        scores = []
        for channel in range(masks.shape[1]):
            mask = masks[:, channel : channel + 1] - masks[:, channel].min()
            scores.append(model(image * (mask / mask.max().clamp(min=1e-30)))[0, target])
    weights = torch.stack(scores).softmax(0).view(1, -1, 1, 1)
    return (weights * activations).sum(1, keepdim=True).relu()


IMPLEMENTATIONS: dict[str, Explainer] = {
    OURS: captum_fusion,
    f"{OURS}, tolerance=0.1": within(0.1),
    f"{OURS}, tolerance=0.05": within(0.05),
    f"{OURS}, {CLASSES} classes": several_classes(0.0),
    f"{OURS}, {CLASSES} classes, tolerance=0.05": several_classes(0.05),
    "pytorch-grad-cam": pytorch_grad_cam,
    "torchcam": torchcam,
    "one by one": one_by_one,
}


def measure(name: str, implementation: str, file: Path, weights: Path) -> None:
    """Explains one picture in its own process and saves the figures."""
    model, layer, image = load(name, weights)
    rows = 0

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    with torch.no_grad():
        target = int(model(image).argmax())
        model(image)
    counter = model.register_forward_pre_hook(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    attribution = IMPLEMENTATIONS[implementation](model, layer, image, target)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    counter.remove()
    figures: dict[str, Any] = {"seconds": seconds, "megabytes": memory / 1024, "forward_passes": rows}
    maps = interpolate(attribution.float(), image.shape[2:], mode="bilinear")
    np.savez(file, map=maps[0, 0].numpy(), **figures)


def run(name: str, implementations: list[str], repeats: int, weights: Path) -> dict[str, Any]:
    """Measures the implementations on one model."""
    records: dict[str, list[dict[str, float]]] = {implementation: [] for implementation in implementations}
    maps: dict[str, np.ndarray[Any, Any]] = {}
    for repeat in range(repeats):
        for implementation in implementations:
            file = RESULTS / "measurement.npz"
            command = [sys.executable, "-m", "benchmarks.score_cam", "--weights", str(weights)]
            command += ["--measure", name, implementation, str(file)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            with np.load(file) as saved:
                maps[implementation] = saved["map"]
                records[implementation].append({key: float(saved[key]) for key in saved if key != "map"})
            file.unlink()
            sys.stdout.write(f"{name} {implementation} {repeat + 1}/{repeats} {records[implementation][-1]}\n")
            sys.stdout.flush()
    return summarize(records, maps)


def summarize(records: dict[str, list[dict[str, float]]], maps: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Computes medians, ratios to ours repeat by repeat, and the correlation of the maps with ours."""
    ours = records[OURS]
    summary: dict[str, Any] = {}
    for implementation, measurements in records.items():
        ratios = [their["seconds"] / our["seconds"] for their, our in zip(measurements, ours, strict=True)]
        summary[implementation] = {
            "seconds": statistics.median(record["seconds"] for record in measurements),
            "megabytes": statistics.median(record["megabytes"] for record in measurements),
            "forward_passes": measurements[0]["forward_passes"],
            "times_ours": statistics.median(ratios),
            "times_ours_range": [min(ratios), max(ratios)],
            "correlation": float(np.corrcoef(maps[implementation].ravel(), maps[OURS].ravel())[0, 1]),
        }
    return summary


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Score-CAM and its peers",
        "",
        'Every row explains one picture. "Times captum-fusion" is the time divided by the time of captum-fusion in the '
        "same repeat, its median and range. The correlation is with the map of captum-fusion.",
        "",
        "| model | weights | repeats | implementation | seconds | times captum-fusion (range) | forward passes "
        "| extra MB | correlation |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, summary in results.items():
        for implementation in [implementation for implementation in IMPLEMENTATIONS if implementation in summary]:
            row = summary[implementation]
            low, high = row["times_ours_range"]
            lines.append(
                f"| {name} | {'trained' if name in TRAINED else 'random'} | {summary['environment']['repeats']}"
                f" | {implementation} | {row['seconds']:.1f}"
                f" | {row['times_ours']:.2f} ({low:.2f} to {high:.2f})"
                f" | {row['forward_passes']:.0f} | {row['megabytes']:.0f} | {row['correlation']:.4f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", type=Path, default=Path(), help="the folder of the weights (default: this one)")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "IMPLEMENTATION", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, implementation, file = arguments.measure
        measure(name, implementation, Path(file), arguments.weights)
        return
    if OURS not in arguments.implementations:
        parser.error(f"--implementations lacks {OURS!r}, the reference of the others")
    RESULTS.mkdir(exist_ok=True)
    results_file = RESULTS / "score_cam.json"
    # Models that this run does not measure keep their results.
    models = json.loads(results_file.read_text())["models"] if results_file.exists() else {}
    environment = {
        "machine": platform.machine(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "captum", "torchvision", "grad-cam", "torchcam")},
    }
    for name in arguments.models:
        models[name] = run(name, arguments.implementations, arguments.repeats, arguments.weights)
        models[name]["environment"] = environment | {"repeats": arguments.repeats}
        results_file.write_text(json.dumps({"models": models}, indent=2) + "\n")
        (RESULTS / "score_cam.md").write_text(markdown(models))
    sys.stdout.write("\n" + markdown(models))


def processor() -> str:
    """Reads the processor's name from Linux, "unknown" elsewhere."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
