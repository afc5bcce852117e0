"""Times Score-CAM against its peers, on this machine, in one run.

Each measurement is a process of its own, so that no implementation inherits another's memory or caches; the
implementations take turns, repeat by repeat, so that a machine whose speed drifts is fair to all. The processes say how
long one picture took after a warm-up, how much memory it took, and what the map is. Results go to the terminal and to
benchmarks/results/.

    python benchmarks/score_cam.py --repeats 3
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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import get_model

from captum_fusion import LayerScoreCam
from captum_fusion._app.models.loading import load_classifier

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "efficientnet-lite0": "features",
    "mobilenet_v2": "features",
    "resnet50": "layer4",
    "vgg16": "features",
}
# The others have seeded random weights, and noise for a picture.
TRAINED = ("efficientnet-lite0",)
OURS = "captum-fusion"
CLASSES = 5
Explainer = Callable[[nn.Module, nn.Module, Tensor, int], Tensor]


class Features(nn.Module):
    """EfficientNet-Lite0 up to its activated head, as one module that every implementation can hook."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.extract_features(x)


def load(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The model, its layer and an input: a real photograph for real weights, else noise for seeded random weights."""
    if name == "efficientnet-lite0":
        from PIL import Image
        from skimage.data import coffee

        classifier = load_classifier()
        lite = classifier.model
        parts = OrderedDict(
            features=Features(lite), pool=lite._avg_pooling, flatten=nn.Flatten(), dropout=lite._dropout, head=lite._fc
        )
        model = nn.Sequential(parts).eval()
        image = classifier.preprocessing.normalize(classifier.preprocessing.crop(Image.fromarray(coffee())))
    else:
        torch.manual_seed(0)
        model = get_model(name, weights=None).eval()
        image = torch.randn(1, 3, 224, 224)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, model.get_submodule(MODELS[name]), image


def captum_fusion(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    return LayerScoreCam(model, layer).attribute(image, target=target, relu_attributions=True)


def within(tolerance: float) -> Explainer:
    def explain(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
        score_cam = LayerScoreCam(model, layer, tolerance=tolerance)
        return score_cam.attribute(image, target=target, relu_attributions=True)

    return explain


def several_classes(tolerance: float) -> Explainer:
    """The target and the classes after it, of the one picture."""

    def explain(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
        score_cam = LayerScoreCam(model, layer, tolerance=tolerance)
        targets = [(target + step) % 1000 for step in range(CLASSES)]
        images = image.expand(CLASSES, -1, -1, -1)
        return score_cam.attribute(images, target=targets, relu_attributions=True)[:1]

    return explain


def pytorch_grad_cam(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with ScoreCAM(model, [layer]) as cam:
        return torch.from_numpy(cam(image, [ClassifierOutputTarget(target)])).unsqueeze(1)


def torchcam(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    from torchcam.methods import ScoreCAM

    with ScoreCAM(model, layer) as cam, torch.inference_mode():
        model(image)
        return cam(target)[0].reshape(1, 1, *layer_shape(model, layer, image)[2:])


def one_by_one(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        model(image)
        hook.remove()
        masks = interpolate(kept[0], image.shape[2:], mode="bilinear")
        scores = []
        for channel in range(masks.shape[1]):
            mask = masks[:, channel : channel + 1] - masks[:, channel].min()
            scores.append(model(image * (mask / mask.max().clamp(min=1e-30)))[0, target])
    weights = torch.stack(scores).softmax(0).view(1, -1, 1, 1)
    return (weights * kept[0]).sum(1, keepdim=True).relu()


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


def layer_shape(model: nn.Module, layer: nn.Module, image: Tensor) -> torch.Size:
    shapes: list[torch.Size] = []
    hook = layer.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    with torch.no_grad():
        model(image)
    hook.remove()
    return shapes[0]


def measure(name: str, implementation: str, file: Path) -> None:
    """Runs in a process of its own: explains one picture and saves the figures."""
    model, layer, image = load(name)
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
    figures = {"seconds": seconds, "megabytes": memory / 1024, "forward_passes": rows}
    maps = interpolate(attribution.float(), image.shape[2:], mode="bilinear")
    np.savez(file, map=maps[0, 0].numpy(), **figures)


def run(name: str, implementations: list[str], repeats: int) -> dict[str, object]:
    """Measures the implementations on one model."""
    records: dict[str, list[dict[str, float]]] = {implementation: [] for implementation in implementations}
    maps: dict[str, np.ndarray] = {}
    for repeat in range(repeats):
        for implementation in implementations:
            file = RESULTS / "measurement.npz"
            command = [sys.executable, __file__, "--measure", name, implementation, str(file)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            with np.load(file) as saved:
                maps[implementation] = saved["map"]
                records[implementation].append({key: float(saved[key]) for key in saved if key != "map"})
            file.unlink()
            sys.stdout.write(f"{name} {implementation} {repeat + 1}/{repeats} {records[implementation][-1]}\n")
            sys.stdout.flush()
    return summarize(records, maps)


def summarize(records: dict[str, list[dict[str, float]]], maps: dict[str, np.ndarray]) -> dict[str, object]:
    """Medians, ratios repeat by repeat against ours, and the correlation of the maps with ours."""
    ours = records[OURS]
    summary: dict[str, object] = {}
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


def markdown(results: dict[str, object]) -> str:
    lines = [
        "| model | weights | implementation | seconds | times captum-fusion (range) | forward passes | extra MB "
        "| correlation |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, summary in results.items():
        for implementation in [implementation for implementation in IMPLEMENTATIONS if implementation in summary]:
            row = summary[implementation]
            low, high = row["times_ours_range"]
            lines.append(
                f"| {name} | {'trained' if name in TRAINED else 'random'} | {implementation} | {row['seconds']:.1f}"
                f" | {row['times_ours']:.2f} ({low:.2f} to {high:.2f})"
                f" | {row['forward_passes']:.0f} | {row['megabytes']:.0f} | {row['correlation']:.4f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "IMPLEMENTATION", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, implementation, file = arguments.measure
        measure(name, implementation, Path(file))
        return
    if OURS not in arguments.implementations:
        parser.error(f"--implementations needs {OURS!r}, which the others are compared with")
    RESULTS.mkdir(exist_ok=True)
    results_file = RESULTS / "score_cam.json"
    # Models that are not measured this time keep their results.
    models = json.loads(results_file.read_text())["models"] if results_file.exists() else {}
    environment = {
        "machine": platform.machine(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "captum", "torchvision", "grad-cam", "torchcam")},
    }
    for name in arguments.models:
        models[name] = run(name, arguments.implementations, arguments.repeats)
        models[name]["environment"] = environment | {"repeats": arguments.repeats}
        results_file.write_text(json.dumps({"models": models}, indent=2) + "\n")
        (RESULTS / "score_cam.md").write_text(markdown(models))
    sys.stdout.write("\n" + markdown(models))


def processor() -> str:
    """The processor's name where Linux tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
