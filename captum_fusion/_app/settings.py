"""The settings of the commands, and a benchmark's metrics; without torch, so that ``--help`` is instant."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from cyclopts import Parameter

from captum_fusion._app.messages import close_names
from captum_fusion._app.options import DEFAULT_ALPHA, DEFAULT_WEIGHTING, IntOption, ListOption, ModelSelection
from captum_fusion.arguments import Weighting, check_activation, check_percentile, check_tolerance

if TYPE_CHECKING:
    from captum_fusion._app.methods import Method

Target = Literal["predicted", "label", "best-label"]
Precision = Literal["float32", "bfloat16", "float16"]
Protocol = Literal["xplain-cam"]
# Xplain-CAM removes 448 of 224 x 224 pixels a step.
_PROTOCOL_SIZE, _PROTOCOL_STEPS = 224, 112


class Measure(NamedTuple):
    """A column of the records, and how reports show its mean."""

    column: str
    scale: float
    """The factor that papers report it with."""
    higher: bool
    """Whether higher is better."""
    short: str
    """Its name in narrow tables."""
    source: str = ""
    """The metric that measures it, where that has another name than the column."""
    needs: str = ""
    """The regions that it needs: "boxes", "mask" or "instances"."""

    @property
    def metric(self) -> str:
        """The metric that measures it."""
        return self.source or self.column

    @property
    def arrow(self) -> str:
        """The direction of better values."""
        return "↑" if self.higher else "↓"


# By their names in the summary.
MEASURES = {
    "average_drop": Measure("confidence_drop", 100, False, "AD"),
    "average_increase": Measure("confidence_increase", 100, True, "AI"),
    "insertion": Measure("insertion", 1, True, "Ins"),
    "deletion": Measure("deletion", 1, False, "Del"),
    "overall": Measure("overall", 1, True, "All", source="insertion"),
    "road_most": Measure("road_most", 1, False, "RM", source="road"),
    "road_least": Measure("road_least", 1, True, "RL", source="road"),
    "road": Measure("road", 1, True, "ROAD"),
    "coherency": Measure("coherency", 100, True, "Coh"),
    "complexity": Measure("complexity", 100, False, "Com"),
    "adcc": Measure("adcc", 100, True, "ADCC"),
    "pointing_game": Measure("pointing_game", 100, True, "PG", needs="boxes"),
    "energy_pointing_game": Measure("energy_pointing_game", 100, True, "EPG", needs="boxes"),
    "mask_pointing_game": Measure("mask_pointing_game", 100, True, "MPG", needs="mask"),
    "mask_energy_pointing_game": Measure("mask_energy_pointing_game", 100, True, "MEPG", needs="mask"),
    "instances_reached": Measure("instances_reached", 100, True, "IR", needs="instances"),
}
METRICS = tuple(dict.fromkeys(measure.metric for measure in MEASURES.values()))
# The metrics that need regions, and which.
LOCALIZATION = {measure.metric: measure.needs for measure in MEASURES.values() if measure.needs}


@dataclass(frozen=True, kw_only=True)
class ExplainSettings:
    """The settings of the command explain, besides its images and its model.

    Args:
        target: The class to explain: an index, a category name or an ImageNet WordNet id. Repeat the option for several
            classes, one row each. Without it, the predicted class.
        methods: Methods from the list of "captum-fusion methods", or "fusion(gradient,region)" of two of them, one
            panel each. Without it, the stages of Fusion-CAM.
        percentile: The percentile of the denoising step of Fusion-CAM and Union-CAM, in [0, 100).
        weighting: The weighting of fusions whose name has no weighting.
        tolerance: The largest estimated error of Score-CAM's map, alone or in a fusion, in [0, 1); 0 is exact. 0.05
            takes about a tenth of the forward passes if activations are not negative.
        alpha: The opacity of a map over the photograph at its maximum, in [0, 1].
        boxes: The share of a map's maximum, in (0, 1], at which boxes around its regions are drawn. Without it, none.
        output: The image file to write, or a folder for one image file per input.
        save_npz: A file for the raw maps and their metadata, or a folder for one such file per input.
        save_predictions: A file for the most probable classes of each image, ending in .csv or .json.
        top: The number of classes in that file.
        force: Overwrite files.
    """

    target: Annotated[tuple[str, ...], Parameter(alias="-t", show_default=False)] = ()
    methods: Annotated[tuple[str, ...], ListOption, Parameter(show_default=False)] = ()
    percentile: float = 10.0
    weighting: Weighting = DEFAULT_WEIGHTING
    tolerance: float = 0.0
    alpha: float = DEFAULT_ALPHA
    boxes: Annotated[float | None, Parameter(show_default=False)] = None
    output: Annotated[Path, Parameter(alias="-o")] = Path("explained")
    save_npz: Path | None = None
    save_predictions: Path | None = None
    top: IntOption = 5
    force: bool = False

    def check(self) -> None:
        """Refuses unknown names and values outside their range."""
        # Imports torch, for which --help need not wait.
        from captum_fusion._app.explainer import checked_methods

        checked_methods(self.methods, self.percentile, self.weighting, self.tolerance)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; expected a number in [0, 1]")
        if self.boxes is not None and not 0 < self.boxes <= 1:
            raise ValueError(f"boxes is {self.boxes}; expected a number in (0, 1]")
        if self.top < 1:
            raise ValueError(f"top is {self.top}; expected at least 1")
        if len(self.target) > 1 and self.save_npz is not None:
            raise ValueError(f"--save-npz saves the maps of one target, not of {len(self.target)}; pass one --target")


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSelection):
    """The settings of a benchmark.

    Args:
        images: A folder of images; a folder with one folder of images for each class; imagenet:ROOT, voc2007:ROOT or
            voc2012:ROOT for a torchvision dataset on disk; or coco:FILE for COCO's instances_val2017.json or another
            file in its format, with its images beside it or in COCO's own folder.
        output: The folder for records and report; created if missing.
        labels: A JSON file with the class index of each image of a plain folder, by file name.
        labels_by_order: Match the folder's classes with the model's classes by order if their names do not match.
        methods: Methods with the names that explain accepts. A fusion's name may end in its weighting, as
            fusion-cam:raw. The controls random-map and centred-gaussian ignore the model: compare the metrics of other
            methods with theirs.
        metrics: Any of confidence_drop, confidence_increase, insertion, deletion, road, complexity; coherency and adcc,
            which run each method twice; pointing_game and energy_pointing_game, which need boxes; mask_pointing_game
            and mask_energy_pointing_game, which need outlines; and instances_reached, which needs either.
        tolerance: The largest estimated error of Score-CAM's map, alone or in a fusion, in [0, 1); 0 is exact.
        percentiles: Percentiles of the denoising step, in [0, 100), for every method that has this step.
        stages: Also evaluate the stages of each fusion.
        target: Explain the predicted class, each label of an image (label), or the most probable of its labels
            (best-label). For VOC and COCO, an ImageNet model explains the classes that name the object: for a dog, the
            most probable breed.
        limit: The number of images.
        seed: Draw the images at random with this seed instead of taking the first ones.
        steps: The number of steps of insertion and deletion.
        protocol: xplain-cam is the protocol of the figures in Xplain-CAM's README: images squashed to 224, the last
            convolution unless --layer names another layer, insertion from a Gaussian blur (kernel 51, sigma 50),
            deletion to 0, both in 112 steps, and a drop of max(0, Y - O) / (Y + 1e-8). It sets size and steps.
        precision: float32, or bfloat16 or float16 for autocast.
        batch_size: The number of images in one batch.
        compile: Run the masked inputs through torch.compile, which pays off for many images.
        strict: Stop at an image that cannot be read or a method that fails, instead of recording the error.
    """

    images: str | Path
    output: Annotated[str | Path, Parameter(alias="-o")]
    labels: str | Path | None = None
    labels_by_order: bool = False
    methods: Annotated[Sequence[str], ListOption] = ("grad-cam", "score-cam", "fusion-cam")
    metrics: Annotated[Sequence[str], ListOption] = ("confidence_drop", "confidence_increase", "insertion", "deletion")
    tolerance: float = 0.0
    percentiles: Annotated[Sequence[float], ListOption, Parameter(name="--percentile")] = (10.0,)
    stages: bool = False
    target: Annotated[Target, Parameter(alias="-t")] = "predicted"
    limit: IntOption | None = None
    seed: IntOption | None = None
    steps: IntOption = 100
    protocol: Protocol | None = None
    precision: Precision = "float32"
    batch_size: IntOption = 1
    compile: bool = False
    strict: bool = False

    def check(self) -> None:
        """Refuses unknown names and values outside their range."""
        for name in ("models", "layers", "weights", "methods", "metrics", "percentiles"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected a list")
            if not getattr(self, name) and name not in ("layers", "weights"):
                raise ValueError(f"{name} is empty; expected at least one")
        # Imports torch, for which --help need not wait.
        from captum_fusion._app.models.torchvision import check_name

        for model in self.models:
            check_name(model)
        self.parsed_methods()
        choices: list[tuple[str, str, Sequence[str]]] = [("metrics", metric, METRICS) for metric in self.metrics]
        choices += [("target", self.target, get_args(Target)), ("precision", self.precision, get_args(Precision))]
        choices += [("protocol", self.protocol, get_args(Protocol))] if self.protocol is not None else []
        for name, choice, allowed in choices:
            if choice not in allowed:
                raise ValueError(f"{name} is {choice!r}.{close_names(choice, allowed)} Expected {', '.join(allowed)}")
        check_activation(self.activation)
        check_tolerance(self.tolerance)
        for percentile in self.percentiles:
            check_percentile(percentile)
        for name, least in (("limit", 1), ("seed", 0), ("steps", 1), ("batch_size", 1)):
            number: Any = getattr(self, name)
            if number is None and name in ("limit", "seed"):
                continue
            if type(number) is not int:
                raise ValueError(f"{name} is {number!r}; expected a whole number")
            if number < least:
                raise ValueError(f"{name} is {number}; expected at least {least}")
        self.each()

    def resolved(self) -> "Settings":
        """The settings with those that the protocol sets.

        Raises:
            ValueError: If one of them is set to another value.
        """
        if self.protocol is None:
            return self
        for name, own, values in (
            ("size", _PROTOCOL_SIZE, (None, _PROTOCOL_SIZE)),
            ("steps", _PROTOCOL_STEPS, (Settings.steps, _PROTOCOL_STEPS)),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)}, but the protocol {self.protocol} sets it to {own}")
        return replace(self, size=_PROTOCOL_SIZE, steps=_PROTOCOL_STEPS)

    def parsed_methods(self) -> "list[Method]":
        """The methods, each once."""
        # Imports torch, for which --help need not wait.
        from captum_fusion._app.methods import parse_method

        return list(dict.fromkeys(parse_method(name) for name in self.methods))

    @property
    def localized(self) -> bool:
        """Tells whether a metric needs the regions of objects."""
        return any(metric in LOCALIZATION for metric in self.metrics)
