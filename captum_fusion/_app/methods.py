"""Methods by name, for the command and the benchmark."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from inspect import getdoc, signature
from typing import Any

import torch
from captum.attr import (
    Attribution,
    Deconvolution,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerAttribution,
    LayerGradCam,
    LayerGradientXActivation,
    Saliency,
)
from torch import Tensor
from torch.nn import Module

from captum_fusion import attr
from captum_fusion._app.messages import close_names, one_line
from captum_fusion._app.options import DEFAULT_WEIGHTING
from captum_fusion.arguments import WEIGHTINGS, Activation, Weighting
from captum_fusion.attr import LayerFusionCam

# The standard deviation, as a share of each side: about the size of an object in the middle.
_GAUSSIAN_WIDTH = 0.25


class LayerRandomMap(LayerAttribution):
    """A control: independent uniform values in the layer's size, seeded by the input, so that each has its own map."""

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:  # noqa: ARG002
        """Computes the maps, whatever the target."""
        shape = LayerActivation(self.forward_func, self.layer).attribute(inputs).shape[2:]
        maps = []
        for row in inputs.detach():
            digest = hashlib.sha256(row.cpu().contiguous().numpy().tobytes()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
            maps.append(torch.rand(1, *shape, generator=generator))
        return torch.stack(maps).to(inputs.device)


class CentredGaussian(Attribution):
    """A control: a Gaussian in the middle, a quarter of each side wide: most photographs show their object there."""

    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:  # noqa: ARG002
        """Computes the maps, whatever the target."""
        exponent = torch.zeros((), device=inputs.device)
        for side in inputs.shape[2:]:
            offset = (torch.arange(side, device=inputs.device) + 0.5) / side - 0.5
            exponent = exponent.unsqueeze(-1) - (offset / _GAUSSIAN_WIDTH) ** 2 / 2
        return exponent.exp().expand(len(inputs), 1, *exponent.shape)


_CAPTUM_METHODS: tuple[type[Attribution], ...] = (
    LayerGradCam,
    LayerGradientXActivation,
    GuidedGradCam,
    Saliency,
    InputXGradient,
    IntegratedGradients,
    GuidedBackprop,
    Deconvolution,
)


def _name(method: type[Attribution]) -> str:
    """The name of a class in the command: "grad-cam++" for ``LayerGradCamPlusPlus``."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*", method.__name__.removeprefix("Layer"))
    return "-".join(words).lower().replace("-plus-plus", "++")


# The controls: references for every metric, whose maps do not depend on the model.
_CONTROLS: tuple[type[Attribution], ...] = (LayerRandomMap, CentredGaussian)
_CLASSES: dict[str, type[Attribution]] = {
    _name(method): method for method in (*_CAPTUM_METHODS, *attr.METHODS, *_CONTROLS)
}
CONTROLS = tuple(map(_name, _CONTROLS))
METHODS = tuple(name for name in _CLASSES if name not in CONTROLS)


def summary(name: str) -> str:
    """The first sentence of the docstring of a method's class."""
    first = one_line((getdoc(_CLASSES[name]) or "").partition("\n\n")[0])
    return first.partition(". ")[0].removesuffix(".") + "."


def _loosely(name: str) -> str:
    """A name without case and separators: "Grad-CAM-plus-plus" is "gradcam++"."""
    return re.sub(r"[\s_-]", "", name.lower()).replace("plusplus", "++")


_BY_LOOSE_NAME = {_loosely(name): name for name in _CLASSES}


def _find(text: str) -> str | None:
    """The name of the method that is meant by a text, which may be the name of its class."""
    loose = _loosely(text)
    return _BY_LOOSE_NAME.get(loose) or _BY_LOOSE_NAME.get(loose.removeprefix("layer"))


_FUSION = re.compile(r"(?:([^,():]+)|fusion\(([^,()]+),([^,()]+)\))(?::(\w+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Method:
    """A method as it is named, with its components and weighting if it fuses two."""

    name: str
    components: tuple[str, str] | None = None
    weighting: Weighting = DEFAULT_WEIGHTING

    @property
    def has_percentile(self) -> bool:
        """Tells whether the method denoises by a percentile."""
        return self.components is not None or self.name == "union-cam"

    @property
    def has_tolerance(self) -> bool:
        """Tells whether the method, or a component of it, infers the scores of channels."""
        names = self.components or (self.name, *self.parts)
        return any("tolerance" in signature(_CLASSES[name]).parameters for name in names)

    @property
    def parts(self) -> tuple[str, ...]:
        """The methods whose attributions this one takes."""
        if self.components is not None:
            return self.components
        return ("score-cam",) if "region_method" in signature(_CLASSES[self.name]).parameters else ()

    @property
    def part_arguments(self) -> tuple[str, ...]:
        """The arguments of ``attribute`` that take the attributions of the parts."""
        return ("gradient_attributions", "region_attributions")[-len(self.parts) :] if self.parts else ()

    def build(
        self,
        model: Module,
        layer: Module,
        activation: Activation = "softmax",
        compiled: Callable[..., Any] | None = None,
        tolerance: float = 0.0,
    ) -> Attribution:
        """The attribution of a model and a layer.

        ``compiled`` is the model after ``torch.compile``, for the masked passes of our methods; Captum's set hooks,
        which compiled code ignores.
        """

        def build(name: str) -> Attribution:
            method = _CLASSES[name]
            parameters = signature(method).parameters
            options: dict[str, Any] = {"activation": activation, "tolerance": tolerance}
            options = {option: value for option, value in options.items() if option in parameters}
            # A compiled model may have no truth value.
            forward_func = model if compiled is None or method not in attr.METHODS else compiled
            return method(forward_func, *([layer] if "layer" in parameters else []), **options)

        if self.components is None:
            return build(self.name)
        gradient, region = map(build, self.components)
        forward_func = model if compiled is None else compiled
        return LayerFusionCam(
            forward_func, layer, activation=activation, gradient_method=gradient, region_method=region
        )


def parse_method(text: str, weighting: Weighting = DEFAULT_WEIGHTING) -> Method:
    """A method from its name, in which case and separators do not count: "Grad-CAM" and "gradcam" are "grad-cam".

    Args:
        text (str): One of ``METHODS``, or "fusion(gradient,region)" for any two of the others; a fusion may be
            followed by ":raw" or another of its weightings.
        weighting (str, optional): The weighting of a fusion that names none. Default: "raw"

    Returns:
        *Method*.

    Raises:
        ValueError: If there is no such method, naming the close ones.
    """
    parts = _FUSION.fullmatch("".join(text.split()))
    plain, gradient, region, named = parts.groups() if parts else (text, None, None, None)
    name = None if plain is None else _find(plain)
    if plain is not None and (name is None or (named is not None and name != "fusion-cam")):
        raise ValueError(
            f"Unknown method {text!r}.{close_names(text.lower(), _CLASSES)} Expected some of {', '.join(METHODS)}, "
            f"the controls {' and '.join(CONTROLS)}, fusion(gradient,region) of two of them, or a fusion with a "
            "weighting such as fusion-cam:raw"
        )
    if name is not None and name != "fusion-cam":
        return Method(name)
    components = ("grad-cam", "score-cam")
    if name is None:
        components = (_component(str(gradient)), _component(str(region)))
        name = f"fusion({','.join(components)})"
    if named is None:
        return Method(name, components, weighting)
    for known in WEIGHTINGS:
        if known == named.lower():
            return Method(f"{name}:{known}", components, known)
    raise ValueError(f"Unknown weighting {named!r}.{close_names(named, WEIGHTINGS)}")


def _component(text: str) -> str:
    name = _find(text)
    if name is None or name == "fusion-cam":
        names = [known for known in METHODS if known != "fusion-cam"]
        raise ValueError(f"Unknown method {text!r} to fuse.{close_names(text.lower(), names)}")
    return name
