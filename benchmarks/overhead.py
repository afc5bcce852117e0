"""Times Score-CAM, insertion and deletion against the model's own forward passes, on this machine, in one run.

Insertion is also timed with a compiled model whose weights are frozen; its seconds exclude compilation.

A machine's speed drifts by more than the overhead. So each task takes turns with forward passes alone, in every batch
size and memory format, for a few seconds each. The figure is the time per evaluated input over that of the fastest way
to run the model alone, turn by turn. Results go to the terminal and to benchmarks/results/.

    python -m benchmarks.overhead --weights FOLDER
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerActivation, LayerGradCam
from torch import Tensor, nn

from benchmarks.score_cam import MODELS, load
from captum_fusion import LayerScoreCam, spatial_view
from captum_fusion.metrics import deletion, insertion

ROWS = 96
RESULTS = Path(__file__).parent / "results" / "overhead.md"


def score_channels(model: nn.Module, layer: nn.Module, inputs: Tensor, target: int) -> Callable[[], object]:
    """Builds the task of Score-CAM on the channels of the layer that vary most, for ROWS masked inputs in all."""
    activations = LayerActivation(model, layer).attribute(inputs)
    flat = activations.flatten(2)
    spans = (flat.amax(2) - flat.amin(2)).amin(0)
    live = spans.topk(ROWS // len(inputs)).indices

    def replace_live(channels: Tensor, output: Tensor) -> Tensor:
        return output.index_copy(1, live, channels)

    def work() -> None:
        with spatial_view(layer, to_map=lambda output: output[:, live], from_map=replace_live) as view:
            LayerScoreCam(model, view).attribute(inputs, target)

    return work


def overheads(name: str, weights: Path, turns: int) -> dict[str, list[float]]:
    """Computes for each task its seconds per input over those of a forward pass alone, turn by turn."""
    model, layer, image = load(name, weights)
    with torch.no_grad():
        target = int(model(image).argmax())
    attributions = LayerGradCam(model, layer).attribute(image, target)
    works: dict[str, Callable[[], Any]] = {
        "Score-CAM, one image": score_channels(model, layer, image, target),
        "Score-CAM, batch of three": score_channels(
            model, layer, torch.cat([image, image.flip(3), image.flip(2)]), target
        ),
        "insertion": partial(insertion, model, image, attributions, target=target, steps=ROWS),
        "deletion": partial(deletion, model, image, attributions, target=target, steps=ROWS),
    }
    compiled: Any = torch.compile(model, options={"freezing": True})
    works["insertion, compiled"] = partial(insertion, compiled, image, attributions, target=target, steps=ROWS)
    works["insertion, compiled"]()
    for rows in (1, 2, 4, 8, 16):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            batch = torch.rand(rows, *image.shape[1:]).to(memory_format=memory_format)
            works[f"alone, {rows}, {memory_format}"] = partial(model, batch)

    evaluated = 0

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal evaluated
        evaluated += len(args[0])

    counters = [part.register_forward_pre_hook(count) for part in (model, compiled)]
    times: dict[str, list[float]] = {work: [] for work in works}
    with torch.no_grad():
        for _ in range(turns):
            for work, run in works.items():
                evaluated = 0
                start = time.perf_counter()
                while evaluated < 16:
                    run()
                times[work].append((time.perf_counter() - start) / evaluated)
    for counter in counters:
        counter.remove()
    alone = {work: taken for work, taken in times.items() if work.startswith("alone")}
    fastest = min(alone.values(), key=statistics.median)
    return {
        work: [ours / theirs for ours, theirs in zip(taken, fastest, strict=True)]
        for work, taken in times.items()
        if work not in alone
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--weights", type=Path, default=Path(), help="the folder of the weights (default: this one)")
    arguments = parser.parse_args()
    lines = [
        "# Overhead of masked passes",
        "",
        "The time per evaluated input is divided by the time per input of the model alone at its best batch size.",
        "",
        "| model | work | time relative to the forward passes alone, median (range) |",
        "| --- | --- | ---: |",
    ]
    for name in arguments.models:
        for work, ratios in overheads(name, arguments.weights, arguments.turns).items():
            low, high = min(ratios), max(ratios)
            lines.append(f"| {name} | {work} | {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) |")
            sys.stdout.write(f"{lines[-1]}\n")
            sys.stdout.flush()
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
