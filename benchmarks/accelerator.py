"""Measures every method and metric on an accelerator against the CPU, and Score-CAM against its peers there.

It ends within five minutes on one GPU, and runs on a CPU too, with one small network. From the root of the checkout:

    python -m benchmarks.accelerator OUTPUT --weights FOLDER

OUTPUT takes accelerator.md and accelerator.json. --weights holds mobilenet_v2.pt of benchmarks/networks.py; without it
MobileNetV2 has random weights, as the others have. The input is a photograph.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from skimage.data import coffee
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.profiler import ProfilerActivity, profile
from torchvision.models import get_model

from benchmarks.networks import IMAGENET_MEAN, IMAGENET_STD, mobilenet_v2, preprocess
from benchmarks.score_cam import OURS, captum_fusion, one_by_one, pytorch_grad_cam, torchcam, within
from captum_fusion import LayerFusionCam, LayerScoreCam, LayerXGradCam, attr, metrics, spatial_view

LAYERS = {"mobilenet_v3_small": "features", "mobilenet_v2": "features", "resnet50": "layer4", "vgg16": "features"}
GPU_MODELS = ("resnet50", "vgg16", "mobilenet_v2", "vit_b_16")
CPU_MODELS = ("mobilenet_v3_small",)
IMPLEMENTATIONS = {
    OURS: captum_fusion,
    f"{OURS}, tolerance=0.05": within(0.05),
    "pytorch-grad-cam": pytorch_grad_cam,
    "torchcam": torchcam,
    "one by one": one_by_one,
}
# Compilation takes half a minute for each network, so that one stands for all.
COMPILED = ("resnet50",)
ROWS = {"cuda": (64, 256), "cpu": (8, 16)}


class TokenMaps(nn.Module):
    """A ViT up to its last block, whose tokens are given as a map that every implementation can hook."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        patches, encoder = self.model._process_input(x), self.model.encoder
        tokens = torch.cat([self.model.class_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = encoder.layers[:-1](tokens + encoder.pos_embedding)
        maps: Tensor = tokens[:, 1:].mT.reshape(len(tokens), -1, 14, 14)
        return maps


class TokenHead(nn.Module):
    """The last block and the head of a ViT. Its class token is the mean of the others, as a map has none."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.block, self.norm, self.heads = model.encoder.layers[-1], model.encoder.ln, model.heads

    def forward(self, maps: Tensor) -> Tensor:
        tokens = maps.flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        scores: Tensor = self.heads(self.norm(self.block(tokens))[:, 0])
        return scores


def load(name: str, weights: Path | None) -> tuple[nn.Module, nn.Module]:
    """Builds a network and its layer."""
    torch.manual_seed(0)
    if name == "vit_b_16":
        whole = get_model(name, weights=None)
        torch.nn.init.normal_(whole.heads[0].weight, std=0.02)
        model: nn.Module = nn.Sequential(OrderedDict(maps=TokenMaps(whole), head=TokenHead(whole)))
        layer = "maps"
    elif name == "mobilenet_v2" and weights is not None:
        model, layer = mobilenet_v2(), "bn2"
        model.load_state_dict(torch.load(weights / "mobilenet_v2.pt", weights_only=True))
    else:
        model, layer = get_model(name, weights=None), LAYERS[name]
    return model.eval().requires_grad_(False), model.get_submodule(layer)


def small_network() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3))
    model = nn.Sequential(OrderedDict(layer=layer, pool=nn.AdaptiveAvgPool2d(4), flat=nn.Flatten()))
    model.add_module("head", nn.Linear(24 * 16, 10))
    return model.eval(), layer


def on_device(device: torch.device) -> list[dict[str, Any]]:
    """Compares each method and metric on the device with the CPU, with itself, and the state around it."""
    model, layer = small_network()
    images = torch.rand(3, 3, 32, 32)
    maps = torch.rand(3, 1, 32, 32)
    there, layer_there = (moved := copy.deepcopy(model).to(device)), moved.get_submodule("layer")
    options: dict[str, dict[str, Any]] = {
        "Rise": {"samples": 40},
        "LayerSSCam": {"samples": 2, "seed": 0},
        "LayerISCam": {"samples": 3},
    }
    tasks: dict[str, Callable[[nn.Module, nn.Module, Tensor, Tensor], Any]] = {}
    for method in attr.METHODS:
        tasks[method.__name__] = partial(_attribute, method, options.get(method.__name__, {}))
    tasks["LayerScoreCam, tolerance=0.05"] = partial(_attribute, LayerScoreCam, {"tolerance": 0.05})
    tasks["LayerFusionCam, tolerance=0.05"] = partial(_attribute, LayerFusionCam, {"tolerance": 0.05})
    for metric in (metrics.confidence_drop, metrics.insertion, metrics.deletion, metrics.road):
        tasks[metric.__name__] = partial(_measure, metric)
    tasks["evaluate"] = lambda model, _, x, m: torch.stack(
        [values.sum() for values in metrics.evaluate(model, x, m, target=1, steps=8).values()]
    )
    rows = []
    for name, task in tasks.items():
        torch.manual_seed(0)
        expected = task(model, layer, images, maps)
        before = _state(there, device)
        torch.manual_seed(0)
        first, seconds = _timed(partial(task, there, layer_there, images.to(device), maps.to(device)), device)
        torch.manual_seed(0)
        again = task(there, layer_there, images.to(device), maps.to(device))
        rows.append(
            {
                "name": name,
                "difference": float((first.detach().cpu() - expected.detach()).abs().max()),
                "on the device": first.device.type == device.type,
                "same again": bool(torch.equal(first, again)),
                "state kept": _state(there, device) == before,
                "milliseconds": 1000 * seconds,
            }
        )
    return rows


def _attribute(method: Any, options: dict[str, Any], model: nn.Module, layer: nn.Module, x: Tensor, _: Tensor) -> Any:
    layers = () if method is attr.Rise else (layer,)
    return method(model, *layers, **options).attribute(x, target=[1, 2, 3])


def _measure(metric: Any, model: nn.Module, _: nn.Module, x: Tensor, maps: Tensor) -> Any:
    return metric(model, x, maps, target=torch.tensor([1, 2, 3]))


def _state(model: nn.Module, device: torch.device) -> list[Any]:
    values = [tensor.double().sum().item() for tensor in model.state_dict().values()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    gradients = [parameter.grad is None for parameter in model.parameters()]
    random = torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else []
    return [values, hooks, gradients, random, model.training]


def cases(device: torch.device) -> list[dict[str, Any]]:
    """Runs what differs on a device: reduced precision, tokens, arguments on the CPU, too little memory."""
    model, layer = small_network()
    model.to(device)
    x = torch.rand(2, 3, 32, 32, device=device)
    exact = LayerScoreCam(model, layer).attribute(x, target=1)
    scale = exact.abs().max()
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        for tolerance in (0.0, 0.05):
            with torch.autocast(device.type, dtype):
                reduced = LayerScoreCam(model, layer, tolerance=tolerance).attribute(x, target=1)
            error = float((reduced - exact).abs().max() / scale)
            rows.append({"name": f"autocast {dtype}, tolerance={tolerance}", "error": error, "right": error < 0.1})
    whole = get_model("vit_b_16", weights=None).eval().to(device)
    pictures = torch.rand(1, 3, 224, 224, device=device)
    with spatial_view(whole.encoder.layers[-2]) as view:
        tokens = LayerXGradCam(whole, view).attribute(pictures, target=1)
    right = tokens.shape == (1, 1, 14, 14) and tokens.device.type == device.type
    rows.append({"name": "tokens of vit_b_16", "error": 0.0, "right": right})
    moved = LayerFusionCam(model, layer).attribute(x, target=1, baselines=torch.zeros(1, 3, 32, 32))
    error = float((moved - LayerFusionCam(model, layer).attribute(x, target=1)).abs().max())
    rows.append({"name": "baselines on the CPU", "error": error, "right": error == 0})
    if device.type == "cuda":
        rows.append(_too_little_memory(device))
    return rows


def _too_little_memory(device: torch.device) -> dict[str, Any]:
    """Asks for more rows than a small share of the memory takes."""
    model, layer = load("vgg16", None)
    model.to(device)
    x = photograph(device)
    expected = LayerScoreCam(model, layer).attribute(x, target=1)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(3 * 2**30 / total, device)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = LayerScoreCam(model, layer).attribute(x, target=1, perturbations_per_eval=512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    error = float((ours - expected).abs().max() / expected.abs().max())
    halved = any("Out of memory" in str(warning.message) for warning in caught)
    return {"name": "3 GiB for 512 rows of VGG16", "error": error, "right": halved and error < 1e-3}


def photograph(device: torch.device) -> Tensor:
    return preprocess(Image.fromarray(coffee()), 224, IMAGENET_MEAN, IMAGENET_STD).to(device)


def against_peers(name: str, device: torch.device, weights: Path | None, repeats: int) -> list[dict[str, Any]]:
    """Times one map of each implementation, in turns."""
    model, layer = load(name, weights)
    model.to(device)
    x = photograph(device)
    with torch.no_grad():
        target = int(model(x).argmax())
    passes = 0

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal passes
        passes += len(args[0])

    seconds: dict[str, list[float]] = {each: [] for each in IMPLEMENTATIONS}
    figures: dict[str, dict[str, Any]] = {each: {} for each in IMPLEMENTATIONS}
    maps: dict[str, Tensor] = {}
    # The first turn warms up.
    for turn in range(repeats + 1):
        for each, explain in IMPLEMENTATIONS.items():
            if turn and each == "one by one" and seconds[each]:
                continue
            passes = 0
            counter = model.register_forward_pre_hook(count)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            # The peers draw progress bars.
            with redirect_stderr(StringIO()):
                attributions, taken = _timed(partial(explain, model, layer, x, target), device)
            counter.remove()
            if turn or each == "one by one":
                seconds[each].append(taken)
                figures[each]["passes"] = passes
                if device.type == "cuda":
                    figures[each]["peak MiB"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            maps[each] = interpolate(attributions.detach().float().cpu(), x.shape[2:], mode="bilinear").flatten()
    ours = seconds[OURS]
    rows = []
    for each, times in seconds.items():
        ratios = [time / statistics.median(ours) for time in times]
        rows.append(
            {
                "model": name,
                "implementation": each,
                "seconds": statistics.median(times),
                "times": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "correlation": float(torch.corrcoef(torch.stack([maps[each], maps[OURS]]))[0, 1]),
                **figures[each],
            }
        )
    return rows


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Lets multiplications and convolutions on a GPU round to TF32, or not."""
    saved = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved


def throughput(name: str, device: torch.device, weights: Path | None) -> list[dict[str, Any]]:
    """Measures the masked passes of a second against the model's best plain forward passes, in each mode."""
    rows = []
    x = photograph(device)
    expected, passes = None, 0
    modes = ["float32", "channels-last", "bfloat16 autocast", "bfloat16 autocast, channels-last"]
    modes[1:1] = ["TF32"] if device.type == "cuda" else []
    modes += ["compiled"] if name in COMPILED and device.type == "cuda" else []
    for mode in modes:
        model, layer = load(name, weights)
        model.to(device)
        if "channels-last" in mode:
            model.to(memory_format=torch.channels_last)
        with torch.no_grad():
            target = int(model(x).argmax())
        forward: Any = torch.compile(model, dynamic=False) if mode == "compiled" else model
        autocast = torch.autocast(device.type, torch.bfloat16) if "autocast" in mode else nullcontext()
        with autocast, tf32(mode == "TF32"):
            alone = _best_plain(forward, x, device, "channels-last" in mode)
            explain = partial(LayerScoreCam(forward, layer).attribute, x, target=target)
            attributions, _ = _timed(explain, device)
            _, seconds = _timed(explain, device)
            rows_now, busy = _passes(model, explain, device)
            # A compiled model runs no hook that counts; every mode scores the same rows.
            passes = passes or rows_now
        maps = attributions.float() / attributions.abs().max()
        expected = maps if expected is None else expected
        rows.append(
            {
                "model": name,
                "mode": mode,
                "plain": alone,
                "masked": passes / seconds,
                "ratio": alone * seconds / passes,
                "host": max(0.0, 1 - busy / seconds) if device.type == "cuda" else None,
                "difference": float((maps - expected).abs().max()),
            }
        )
    return rows


def _best_plain(forward: Any, x: Tensor, device: torch.device, channels_last: bool) -> float:
    best = 0.0
    for rows in ROWS[device.type]:
        batch = x.expand(rows, -1, -1, -1).contiguous()
        batch = batch.to(memory_format=torch.channels_last) if channels_last else batch
        with torch.no_grad():
            forward(batch)
            taken = min(_timed(partial(forward, batch), device)[1] for _ in range(3))
        best = max(best, rows / taken)
    return best


def _passes(model: nn.Module, explain: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """Counts the rows of one call, and the seconds of its kernels on a GPU."""
    rows = 0

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal rows
        rows += len(args[0])

    counter = model.register_forward_pre_hook(count)
    try:
        with profile(
            activities=[ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
        ) as profiled:
            explain()
    finally:
        counter.remove()
    return rows, sum(float(event.self_device_time_total) for event in profiled.key_averages()) / 1e6


def _timed(task: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    value = task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return value, time.perf_counter() - start


def markdown(results: dict[str, Any]) -> str:
    """Writes the tables."""
    on, peers, modes = results["on the device"], results["peers"], results["modes"]
    lines = [
        "# On an accelerator",
        "",
        ", ".join(f"{name} {value}" for name, value in results["environment"].items())
        + f"; {results['seconds']:.0f} s.",
        "",
        "## Methods and metrics against the CPU",
        "",
        "The table has the largest difference from the CPU in float32, whether a second call returns the same bits, "
        "and whether parameters, buffers, gradients, hooks, mode and random state are unchanged.",
        "",
        "| method or metric | largest difference | same bits again | state kept | ms |",
        "| --- | ---: | --- | --- | ---: |",
    ]
    yes = {True: "yes", False: "**no**"}
    lines += [
        f"| {row['name']} | {row['difference']:.1e} | {yes[row['same again']]} | {yes[row['state kept']]} "
        f"| {row['milliseconds']:.1f} |"
        for row in on
    ]
    lines += ["", "| case | error | right |", "| --- | ---: | --- |"]
    lines += [f"| {row['name']} | {row['error']:.1e} | {yes[row['right']]} |" for row in results["cases"]]
    lines += [
        "",
        "## Score-CAM and its peers",
        "",
        '"Times captum-fusion" is the time divided by the time of captum-fusion, with its range. The correlation is '
        "with the map of captum-fusion.",
        "",
        "| model | implementation | seconds | times captum-fusion | passes | peak MiB | correlation |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['model']} | {row['implementation']} | {row['seconds']:.2f} "
        f"| {row['times']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}) | {row['passes']} "
        f"| {_or_dash(row.get('peak MiB'), '.0f')} | {row['correlation']:.4f} |"
        for row in peers
    ]
    lines += [
        "",
        "## Masked passes against plain ones",
        "",
        "The table has the passes per second of the model alone at its best batch size and of exact Score-CAM, the "
        "share of Score-CAM's time in which the device waits for the host, and the largest difference from Score-CAM's "
        "map in float32, as a fraction of its maximum.",
        "",
        "| model | mode | plain passes/s | Score-CAM's passes/s | plain / Score-CAM's | host's share | difference |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['model']} | {row['mode']} | {row['plain']:.0f} | {row['masked']:.0f} | {row['ratio']:.2f} "
        f"| {_or_dash(row['host'], '.0%')} | {row['difference']:.1e} |"
        for row in modes
    ]
    return "\n".join(lines) + "\n"


def _or_dash(value: float | None, form: str) -> str:
    """Formats a value that only a GPU has."""
    return "-" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--models", nargs="+", choices=sorted({*GPU_MODELS, *CPU_MODELS}))
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    models = given.models or (GPU_MODELS if device.type == "cuda" else CPU_MODELS)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    environment = {
        "device": name,
        **{package: version(package) for package in ("torch", "captum", "grad-cam", "torchcam")},
    }
    start = time.perf_counter()
    results: dict[str, Any] = {"environment": environment, "on the device": [], "cases": [], "peers": [], "modes": []}
    given.output.mkdir(parents=True, exist_ok=True)
    steps: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = [
        ("on the device", partial(on_device, device)),
        ("cases", partial(cases, device)),
    ]
    steps += [("peers", partial(against_peers, model, device, given.weights, given.repeats)) for model in models]
    steps += [("modes", partial(throughput, model, device, given.weights)) for model in models]
    for step, measure in steps:
        with tf32(False):
            results[step] += measure()
        results["seconds"] = time.perf_counter() - start
        sys.stdout.write(f"{results['seconds']:.0f} s: {step} {json.dumps(results[step][-1])}\n")
        sys.stdout.flush()
        (given.output / "accelerator.json").write_text(json.dumps(results, indent=1) + "\n")
        (given.output / "accelerator.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
