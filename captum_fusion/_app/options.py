"""Options by name, with their defaults and descriptions; without torch, so that ``--help`` is instant."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, cast

from captum_fusion.arguments import Activation, Weighting, check_activation

if TYPE_CHECKING:
    from cyclopts import Parameter, Token
else:
    try:
        from cyclopts import Parameter
    except ModuleNotFoundError:  # Python alone needs no command line.
        Parameter = dict

Precision = Literal["float32", "bfloat16", "float16"]
"""The precision of the forward passes; all but float32 is by autocast."""

DEFAULT_MODEL = "efficientnet-lite0"
"""The network whose ImageNet weights the demo extra brings."""

DEFAULT_ALPHA = 0.8
"""The opacity of a map over the photograph where it is 1, in [0, 1]."""

DEFAULT_WEIGHTING: Weighting = "raw"
"""The weighting of a fusion that names none, as in ``LayerFusionCam``."""


def _whole_number(_: object, tokens: "Sequence[Token]") -> int:
    """A whole number; the command line's own reading would round fractions."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"expected a whole number, not {tokens[0].value!r}") from None


def _activation(_: object, tokens: "Sequence[Token]") -> Activation:
    """An activation; the command line's own reading would take "none" as if it was not given."""
    check_activation(tokens[0].value)
    return cast(Activation, tokens[0].value)


IntOption = Annotated[int, Parameter(converter=_whole_number)]
ListOption = Parameter(consume_multiple=True)
ActivationOption = Annotated[Activation, Parameter(converter=_activation)]


class ModelOptions(TypedDict, total=False):
    """The options of a model: its weights, the layer to explain, the preprocessing, and the activation of its scores.

    Args:
        weights: A file with a state dict, or "none" for seeded random weights (a dry run without downloads). Without
            it, the default weights of the model, or those that a callable gives it.
        layer: The dotted name of the layer to explain, which may return tokens or a channels-last map. Without it, the
            last layer with spatial resolution that feeds the whole output.
        grid: The rows and columns of the layer's tokens, if they cannot be inferred from the input.
        size: Input size in pixels. Without it, the size of the model's weights, or 224.
        mean: Mean of each channel; one value for a model of grey images. Without it, the mean of the model's weights,
            or ImageNet's.
        std: Standard deviation of each channel, with the same defaults as mean.
        activation: The function from scores to probabilities: softmax, or sigmoid for a binary or multi-label
            classifier. Without it, the activation that a Hugging Face model declares, or softmax.
        classes: A file with one class name per line, or a JSON file with a list of the names or an object with the
            index of each name. Without it, the names that come with the model.
        device: The device to compute on. Without it, cuda if available, else cpu.
        precision: bfloat16 or float16 for autocast, which is faster on hardware that supports it and changes maps by
            some hundredths. Without it, float32.
    """

    weights: str | None
    layer: Annotated[str | None, Parameter(alias="-l")]
    grid: tuple[IntOption, IntOption] | None
    size: IntOption | None
    mean: Annotated[tuple[float, ...] | None, ListOption]
    std: Annotated[tuple[float, ...] | None, ListOption]
    activation: ActivationOption | None
    classes: str | None
    device: str | None
    precision: Precision


@dataclass(frozen=True, kw_only=True)
class ModelSelection:
    """One or more classifiers, each with its weights and its layer, and the options that they share.

    Args:
        models: One or more classifiers, with the names that explain accepts.
        weights: For each model a file with a state dict or "none" for seeded random weights, or one value for all
            models. Without it, the default weights, or those that a callable gives its model.
        layers: The dotted name of a layer for each model, or one name for all models. Without it, the last layer with
            spatial resolution that feeds the whole output.
        grid: The rows and columns of the tokens of these layers, if they cannot be inferred from the input.
        size: Input size in pixels. Without it, the size of each model's weights, or 224.
        mean: Mean of each channel; one value for models of grey images. Without it, the mean of each model's weights,
            or ImageNet's.
        std: Standard deviation of each channel, with the same defaults as mean.
        activation: The function from scores to probabilities: softmax, or sigmoid for binary or multi-label
            classifiers. Without it, the activation that a Hugging Face model declares, or softmax.
        classes: A file with the names of the classes, in a format that explain accepts.
        device: The device to compute on. Without it, cuda if available, else cpu.
        precision: bfloat16 or float16 for autocast, which is faster on hardware that supports it and changes maps by
            some hundredths. Without it, float32.
    """

    models: Annotated[Sequence[str], ListOption, Parameter(name="--model", alias="-m")] = (DEFAULT_MODEL,)
    weights: Annotated[Sequence[str], ListOption] = ()
    layers: Annotated[Sequence[str], ListOption, Parameter(name="--layer", alias="-l")] = ()
    grid: tuple[IntOption, IntOption] | None = None
    size: IntOption | None = None
    mean: Annotated[tuple[float, ...] | None, ListOption] = None
    std: Annotated[tuple[float, ...] | None, ListOption] = None
    activation: ActivationOption | None = None
    classes: str | None = None
    device: str | None = None
    precision: Precision = "float32"

    def each(self) -> list[dict[str, Any]]:
        """The arguments of ``Explainer`` for each model."""
        names = ("grid", "size", "mean", "std", "activation", "classes", "device", "precision")
        shared = {name: getattr(self, name) for name in names}
        subjects = zip(self.models, self._per_model("weights"), self._per_model("layers"), strict=True)
        return [{"model": model, "weights": weights, "layer": layer, **shared} for model, weights, layer in subjects]

    def _per_model(self, name: str) -> list[str | None]:
        """The values for the models: one for each, one for all, or None for all."""
        values, count = [str(value) for value in getattr(self, name)], len(self.models)
        if len(values) not in (0, 1, count):
            raise ValueError(
                f"{len(values)} {name} were given for {count} models; expected one for each, one for all, or none"
            )
        return [*values] * (count if len(values) == 1 else 1) if values else [None] * count
