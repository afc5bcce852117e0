"""Times insertion and deletion against the model's own forward passes, in one run.

python benchmarks/metrics.py
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from captum.attr import LayerGradCam

from benchmarks.score_cam import best_forward_rate, load
from captum_fusion.metrics import deletion, insertion

STEPS, REPEATS = 100, 5


def main() -> None:
    lines = ["| model | metric | seconds over those of its forward passes alone (range) |", "| --- | --- | ---: |"]
    for name in ("efficientnet-lite0", "mobilenet_v2"):
        model, layer, image = load(name)
        with torch.no_grad():
            target = int(model(image).argmax())
        attributions = LayerGradCam(model, layer).attribute(image, target)
        for metric in (insertion, deletion):
            overheads = []
            metric(model, image, attributions, target=target, steps=4)
            for _ in range(REPEATS):
                start = time.perf_counter()
                metric(model, image, attributions, target=target, steps=STEPS)
                seconds = time.perf_counter() - start
                # One pass more checks the inputs.
                overheads.append(seconds * best_forward_rate(model, seconds=4.0) / (STEPS + 2))
            median = statistics.median(overheads)
            lines.append(
                f"| {name} | {metric.__name__} | {median:.2f} ({min(overheads):.2f} to {max(overheads):.2f}) |"
            )
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "metrics.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
