"""The settings of a benchmark: one value for Python and for the command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import Parameter

from captum_fusion._app.messages import close_names
from captum_fusion._app.options import METRICS, IntOption, ListOption, ModelSelection, Precision, Target
from captum_fusion.arguments import ACTIVATIONS

if TYPE_CHECKING:
    from captum_fusion._app.methods import Method


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSelection):
    """What a benchmark explains, by which methods and metrics, and where its records go.

    Args:
        images: A folder of pictures, a folder with a folder of pictures for each class, imagenet:ROOT, voc2007:ROOT or
            voc2012:ROOT for a torchvision dataset that is on disk, or coco:FILE for COCO's instances_val2017.json or
            another file of its form, whose pictures lie beside it or where COCO has them.
        output: The folder for records and report; made if it does not exist.
        labels: A JSON file with the class index of each picture of a plain folder, by its name.
        labels_by_order: Take a folder's classes for the model's in their order, where names differ.
        methods: Methods named as for explain; a fusion may name its weighting, as fusion-cam:raw. The controls
            random-map and centred-gaussian show what a metric gives to maps that know nothing of the model.
        metrics: Any of confidence_drop, confidence_increase, insertion, deletion, road, complexity, coherency and adcc,
            for which each method explains a second time, pointing_game and energy_pointing_game, which need boxes,
            mask_pointing_game and mask_energy_pointing_game, which need outlines, and instances_reached, which takes
            either.
        tolerance: The largest error of Score-CAM's map, alone or fused, in [0, 1); 0 is exact.
        percentiles: Percentiles of the denoising step, in [0, 100), for every method that has one.
        stages: Judge the stages of each fusion as well.
        target: Explain the predicted class, each label of a picture, or the one of its labels that the model finds most
            likely. ImageNet's classes name the objects of VOC and COCO: for a dog, the likeliest breed is explained.
        limit: The number of pictures.
        seed: Take a random choice of them instead of the first ones.
        steps: Steps of insertion and deletion.
        precision: float32, or bfloat16 or float16 for autocast.
        batch_size: The number of pictures that are explained together.
        compile: Run the masked inputs through torch.compile, which pays for many pictures.
        strict: Stop at a picture that cannot be read or a method that fails, rather than record the error.
    """

    images: str | Path
    output: Annotated[str | Path, Parameter(alias="-o")]
    labels: str | Path | None = None
    labels_by_order: bool = False
    methods: Annotated[Sequence[str], ListOption] = ("grad-cam", "score-cam", "fusion-cam")
    metrics: Annotated[Sequence[str], ListOption] = METRICS[:4]
    tolerance: float = 0.0
    percentiles: Annotated[Sequence[float], ListOption, Parameter(name="--percentile")] = (10.0,)
    stages: bool = False
    target: Annotated[Target, Parameter(alias="-t")] = "predicted"
    limit: IntOption | None = None
    seed: IntOption | None = None
    steps: IntOption = 100
    precision: Precision = "float32"
    batch_size: IntOption = 1
    compile: bool = False
    strict: bool = False

    def check(self) -> None:
        """Refuses unknown names and values outside their range."""
        # Imports torch, for which --help need not wait; so does parsed_methods.
        from captum_fusion._engine.guards import check_percentile, check_tolerance

        for name in ("models", "layers", "weights", "methods", "metrics", "percentiles"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise TypeError(f"{name} is {values!r}; expected a list of these")
            if not values and name not in ("layers", "weights"):
                raise ValueError(
                    f"{name} is empty; expected at least one of each: models, methods, metrics, percentiles"
                )
        self.parsed_methods()
        choices: list[tuple[str, str, Sequence[str]]] = [("metrics", metric, METRICS) for metric in self.metrics]
        choices += [("target", self.target, get_args(Target)), ("precision", self.precision, get_args(Precision))]
        choices += [("activation", self.activation, ACTIVATIONS)]
        for name, value, expected in choices:
            if value not in expected:
                raise ValueError(f"{name} is {value!r}.{close_names(value, expected)} Expected {', '.join(expected)}")
        for percentile in self.percentiles:
            check_percentile(percentile)
        check_tolerance(self.tolerance)
        for name, least in (("limit", 1), ("seed", 0), ("steps", 1), ("batch_size", 1)):
            number: Any = getattr(self, name)
            if number is None and name in ("limit", "seed"):
                continue
            if type(number) is not int:
                raise ValueError(f"{name} is {number!r}; expected a whole number")
            if number < least:
                raise ValueError(f"{name} is {number}; expected at least {least}")
        self.subjects()

    def parsed_methods(self) -> "list[Method]":
        """The methods, each once."""
        from captum_fusion._app.methods import parse_method

        return list(dict.fromkeys(parse_method(name) for name in self.methods))
