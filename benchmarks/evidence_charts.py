"""The pictures of the evidence's page: differences with their intervals, and cost beside quality."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.evidence_runs import COMPETITORS, CONTROLS, OURS, PERCENTILES, PLACED, SETTINGS, STEPS, Runs, Setting
from benchmarks.evidence_statistics import SIGNIFICANT, Difference
from benchmarks.evidence_tables import PASSES

_ADVANTAGE = "advantage of Fusion-CAM, paired, with its 95 % interval"


def charts(runs: Runs) -> dict[str, Figure]:
    """A picture for each finding of the runs that there are, by its name."""
    found = {}
    if compared := settings_with(runs, COMPETITORS):
        found["claims"] = claims_chart(runs, compared)
    if staged := settings_with(runs, [f"{OURS} combined"]):
        found["stages"] = stages_chart(runs, staged)
    if "coco" in runs.tables:
        others = (*COMPETITORS, *CONTROLS)
        asked = [*(("coco", measure) for measure in PLACED), ("coco-several", "instances_reached")]
        found["localization"] = advantages_chart(runs, asked, others)
    if "imagenet" in runs.tables:
        known = ("average_drop", "average_increase", "insertion", "deletion", "overall")
        found["controls"] = advantages_chart(runs, [("imagenet", measure) for measure in known], CONTROLS)
    if "percentiles" in runs.tables:
        found["percentiles"] = percentiles_chart(runs)
    if "methods" in runs.tables:
        found["cost"] = cost_chart(runs)
    return found


def settings_with(runs: Runs, others: Sequence[str]) -> list[Setting]:
    """The settings in which Fusion-CAM was compared with one of these."""
    return [setting for setting in SETTINGS if runs.compare(setting.run, "average_drop", OURS, others)]


def forest(axis: Axes, found: Sequence[tuple[str, Difference]], title: str) -> None:
    """Differences with their intervals, one above the other, in colour where they are told from none."""
    for place, (_, each) in enumerate(found):
        colour = "0.6" if each.p_value >= SIGNIFICANT else "tab:red" if each.mean < 0 else "tab:green"
        axis.plot([each.low, each.high], [place, place], color=colour, linewidth=1.6)
        axis.plot(each.mean, place, "o", color=colour, markersize=4)
    axis.set_title(title, size=9)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(axis="x", labelsize=8)
    if not found:
        # What is set below would be shared with axes that show something.
        axis.set_facecolor("0.95")
        axis.text(0.5, 0.5, "not measured", size=8, color="0.4", ha="center", transform=axis.transAxes)
        return
    axis.axvline(0, color="black", linewidth=0.6)
    axis.grid(axis="x", linewidth=0.4)
    axis.set_yticks(range(len(found)), [name for name, _ in found], size=8)
    axis.set_ylim(len(found) - 0.4, -0.6)


def claims_chart(runs: Runs, settings: Sequence[Setting]) -> Figure:
    """Fusion-CAM against each method of the comparison."""
    measures = ("average_drop", "average_increase", "overall")
    figure = Figure(figsize=(9.5, 1.3 * len(settings) + 0.6), layout="constrained", dpi=100)
    grid = figure.subplots(len(settings), len(measures), squeeze=False, sharex="col", sharey=True)
    for place, (line, setting) in enumerate(zip(grid, settings, strict=True)):
        for axis, measure in zip(line, measures, strict=True):
            found = runs.compare(setting.run, measure, OURS, COMPETITORS)
            title = "" if place else measure.replace("_", " ")
            forest(axis, [(name, found[name]) for name in COMPETITORS if name in found], title)
        line[0].set_ylabel(setting.shown.replace(" on ", "\n"), size=8)
    figure.supxlabel(_ADVANTAGE, size=9)
    return figure


def stages_chart(runs: Runs, settings: Sequence[Setting]) -> Figure:
    """What each stage adds."""
    measures = ("average_drop", "average_increase", "overall")
    figure = Figure(figsize=(10.5, 1.2 * len(settings) + 0.6), layout="constrained", dpi=100)
    grid = figure.subplots(len(settings), len(measures), squeeze=False, sharex="col", sharey=True)
    for place, (line, setting) in enumerate(zip(grid, settings, strict=True)):
        for axis, measure in zip(line, measures, strict=True):
            found = {name: runs.compare(setting.run, measure, after, (before,)) for name, after, before in STEPS}
            shown = [
                (f"{name.partition(',')[0]} over {before.removeprefix(OURS).strip()}", found[name][before])
                for name, _, before in STEPS
                if before in found[name]
            ]
            forest(axis, shown, "" if place else measure.replace("_", " "))
        line[0].set_ylabel(setting.shown.replace(" on ", "\n"), size=8)
    figure.supxlabel("what each stage adds, paired, positive where it is better, with its 95 % interval", size=9)
    return figure


def advantages_chart(runs: Runs, asked: Sequence[tuple[str, str]], others: Sequence[str]) -> Figure:
    """Fusion-CAM against others by measures of runs."""
    figure = Figure(figsize=(2.1 * len(asked) + 1.2, 0.25 * len(others) + 1.1), layout="constrained", dpi=100)
    for axis, (run, measure) in zip(figure.subplots(1, len(asked), sharey=True), asked, strict=True):
        forest(axis, list(runs.compare(run, measure, OURS, others).items()), measure.replace("_", " "))
    figure.supxlabel(_ADVANTAGE, size=9)
    return figure


def over(runs: Runs, run: str, measure: str, first: str, others: Sequence[str]) -> dict[str, Difference]:
    """The differences of others from a method."""
    return {
        name: each._replace(mean=-each.mean, low=-each.high, high=-each.low)
        for name, each in runs.compare(run, measure, first, others).items()
    }


def percentiles_chart(runs: Runs) -> Figure:
    """Each percentile against 10."""
    measures = ("average_drop", "average_increase", "complexity")
    others = [f"{OURS} {percentile}%" for percentile in PERCENTILES if percentile != 10]
    figure = Figure(figsize=(8.5, 2.2), layout="constrained", dpi=100)
    for axis, measure in zip(figure.subplots(1, len(measures), sharey=True), measures, strict=True):
        found = over(runs, "percentiles", measure, f"{OURS} 10%", others)
        forest(axis, [(name.removeprefix(OURS), each) for name, each in found.items()], measure.replace("_", " "))
    figure.supxlabel("advantage over the 10th percentile, paired, with its 95 % interval", size=9)
    return figure


def cost_chart(runs: Runs) -> Figure:
    """Each method against Grad-CAM, by what it costs."""
    measures = ("average_drop", "insertion", "deletion")
    # Guided Grad-CAM is far from all others; weightings cost and give the same.
    known = [name for name in PASSES if name in runs.values("methods", "average_drop") and name != "guided-grad-cam"]
    others = sorted((name for name in known if name != "grad-cam"), key=PASSES.__getitem__)
    figure = Figure(figsize=(10.5, 3.8), layout="constrained", dpi=100)
    for axis, measure in zip(figure.subplots(1, len(measures), sharey=True), measures, strict=True):
        found = over(runs, "methods", measure, "grad-cam", others)
        forest(axis, [(f"{name}: {PASSES[name]}", found[name]) for name in others], measure.replace("_", " "))
    figure.supxlabel(
        "advantage over Grad-CAM, paired, with its 95 % interval; a method's passes beside its name", size=9
    )
    return figure
