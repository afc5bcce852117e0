"""What a benchmark is asked to do: one value for Python and for the command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import Parameter, Token

from captum_fusion._app.names import close_names
from captum_fusion._app.options import METRICS, Precision, Target
from captum_fusion.arguments import ACTIVATIONS, Activation

if TYPE_CHECKING:
    from captum_fusion._app.methods import Method


def _whole(_: object, tokens: Sequence[Token]) -> int:
    """A whole number; the command line's own reading would round fractions."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"expected a whole number, not {tokens[0].value!r}") from None


IntOption = Annotated[int, Parameter(converter=_whole)]
ListOption = Parameter(consume_multiple=True, negative="")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a benchmark does.

    Args:
        images: A folder of pictures, a folder with a folder of pictures for each class, imagenet:ROOT, voc2007:ROOT or
            voc2012:ROOT for a torchvision dataset that is on disk, or coco:FILE for COCO's instances_val2017.json or
            another file of its form, whose pictures lie beside it or where COCO has them.
        output: The folder for records and report; made if it does not exist.
        models: One or more classifiers, named as for explain.
        layers: The dotted name of a layer for each model, or one for all. Without it, the last feature map that matters
            as a whole.
        grid: The rows and columns of these layers' tokens, where they do not follow from the input.
        weights: For each model a file with a state dict or "none" for seeded random weights, or one for all. Without
            it, the default weights.
        labels: A JSON file with the class index of each picture of a plain folder, by its name.
        labels_by_order: Take a folder's classes for the model's in their order, where names do not tell.
        methods: Methods named as for explain; a fusion may name its weighting, as fusion-cam:raw. The controls
            random-map and centred-gaussian tell what a metric gives for nothing.
        metrics: Any of confidence_drop, confidence_increase, insertion, deletion, road, complexity, coherency and adcc,
            for which each method explains a second time, pointing_game and energy_pointing_game, which need boxes,
            mask_pointing_game and mask_energy_pointing_game, which need outlines, and instances_reached, which takes
            either.
        tolerance: How far Score-CAM, alone or fused, may be from the exact map, in [0, 1); 0 is exact.
        percentiles: Percentiles of the denoising step, in [0, 100), for every method that has one.
        stages: Judge the stages of each fusion as well.
        target: Explain the predicted class, each label of a picture, or the one of its labels that the model finds most
            likely. ImageNet's classes name the objects of VOC and COCO: for a dog, the likeliest breed is explained.
        limit: How many pictures to take.
        seed: Take a random choice of them instead of the first ones.
        steps: Steps of insertion and deletion.
        activation: What makes probabilities of the scores: softmax, or sigmoid for binary or multi-label classifiers.
        device: Where to compute. Without it, cuda if there is one, else cpu.
        precision: float32, or bfloat16 or float16 for autocast.
        batch_size: Pictures that are explained together.
        compile: Run the masked inputs through torch.compile, which pays for many pictures.
        strict: Stop at a picture that cannot be read or a method that fails, rather than record the error.
    """

    images: str | Path
    output: str | Path
    models: Annotated[Sequence[str], ListOption, Parameter(name="--model")] = ("efficientnet-lite0",)
    layers: Annotated[Sequence[str], ListOption, Parameter(name="--layer")] = ()
    grid: Annotated[tuple[IntOption, IntOption] | None, Parameter(negative="")] = None
    weights: Annotated[Sequence[str], ListOption] = ()
    labels: str | Path | None = None
    labels_by_order: Annotated[bool, Parameter(negative="")] = False
    methods: Annotated[Sequence[str], ListOption] = ("grad-cam", "score-cam", "fusion-cam")
    metrics: Annotated[Sequence[str], ListOption] = METRICS[:4]
    tolerance: float = 0.0
    percentiles: Annotated[Sequence[float], ListOption, Parameter(name="--percentile")] = (10.0,)
    stages: Annotated[bool, Parameter(negative="")] = False
    target: Target = "predicted"
    limit: IntOption | None = None
    seed: IntOption | None = None
    steps: IntOption = 100
    activation: Activation = "softmax"
    device: str | None = None
    precision: Precision = "float32"
    batch_size: IntOption = 1
    compile: Annotated[bool, Parameter(negative="")] = False
    strict: Annotated[bool, Parameter(negative="")] = False

    def check(self) -> None:
        """Refuses what names nothing or is outside its range."""
        # Imports torch, for which --help need not wait; so does parsed_methods.
        from captum_fusion._engine.guards import check_percentile, check_tolerance

        for name in ("models", "layers", "weights", "methods", "metrics", "percentiles"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}; expected a list of these")
        for name in ("models", "methods", "metrics", "percentiles"):
            if not getattr(self, name):
                raise ValueError(
                    f"{name} is empty; expected at least one of each: models, methods, metrics, percentiles"
                )
        self.parsed_methods()
        choices: list[tuple[str, str, Sequence[str]]] = [("metrics", metric, METRICS) for metric in self.metrics]
        choices += [("target", self.target, get_args(Target)), ("precision", self.precision, get_args(Precision))]
        choices += [("activation", self.activation, ACTIVATIONS)]
        for name, given, known in choices:
            if given not in known:
                raise ValueError(f"{name} is {given!r}.{close_names(given, known)} Expected {', '.join(known)}")
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
        for name in ("layers", "weights"):
            self._one_each(name)

    def parsed_methods(self) -> "list[Method]":
        """The methods, each once."""
        from captum_fusion._app.methods import parse_method

        return list(dict.fromkeys(parse_method(name) for name in self.methods))

    def subjects(self) -> list[tuple[str, str | None, str | None]]:
        """Each model with its weights and its layer, None where these are the default."""
        weights = [None if given is None else str(given) for given in self._one_each("weights")]
        return list(zip(self.models, weights, self._one_each("layers"), strict=True))

    def _one_each(self, name: str) -> list[str | None]:
        return per_model(name, getattr(self, name), len(self.models))


def per_model(name: str, given: Sequence[str], count: int) -> list[str | None]:
    """What was given for each of some models: one for each, one for all, or None for all."""
    if len(given) not in (0, 1, count):
        raise ValueError(
            f"{len(given)} {name} were given for {count} models; expected one for each, one for all, or none"
        )
    return [*given] * (count if len(given) == 1 else 1) if given else [None] * count
