"""Methods, metrics and settings by name, for the command and the benchmark."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from captum.attr import (
    Attribution,
    Deconvolution,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
    LayerGradientXActivation,
    PerturbationAttribution,
    Saliency,
)
from torch import Tensor
from torch.nn import Module

from captum_fusion._captum import logged
from captum_fusion._names import close_names
from captum_fusion.attr.fusion_cam import LayerFusionCam
from captum_fusion.attr.grad_cam_plus_plus import LayerGradCamPlusPlus
from captum_fusion.attr.group_cam import LayerGroupCam
from captum_fusion.attr.score_cam import LayerScoreCam
from captum_fusion.attr.union_cam import LayerUnionCam
from captum_fusion.attr.x_grad_cam import LayerXGradCam
from captum_fusion.functional import WEIGHTINGS, Weighting


class RememberedScoreCam(LayerAttribution, PerturbationAttribution):
    """Score-CAM that is computed once for all methods that are fused from it.

    ``saved`` counts the seconds that the repeated calls would have taken.
    """

    saved = 0.0
    _kept: tuple[Tensor, Any, Tensor, float] | None = None

    @logged
    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:
        """Attributes as ``LayerScoreCam`` does, at once where inputs and target are those of the last call."""
        if self._kept is not None:
            last_inputs, last_target, attributions, seconds = self._kept
            if torch.equal(inputs, last_inputs) and target == last_target:
                self.saved += seconds
                return attributions
        start = perf_counter()
        attributions = LayerScoreCam(self.forward_func, self.layer).attribute(inputs, target)
        self._kept = (inputs.clone(), target, attributions, perf_counter() - start)
        return attributions


# Each builds the attribution for a model and a layer; the third argument is the Score-CAM of that model and layer.
_BUILDERS: dict[str, Callable[[Module, Module, Attribution], Attribution]] = {
    "grad-cam": lambda model, layer, _: LayerGradCam(model, layer),
    "grad-cam++": lambda model, layer, _: LayerGradCamPlusPlus(model, layer),
    "x-grad-cam": lambda model, layer, _: LayerXGradCam(model, layer),
    "group-cam": lambda model, layer, _: LayerGroupCam(model, layer),
    "score-cam": lambda _, __, score_cam: score_cam,
    "union-cam": lambda model, layer, score_cam: LayerUnionCam(model, layer, region_method=score_cam),
    "layer-gradient-x-activation": lambda model, layer, _: LayerGradientXActivation(model, layer),
    "guided-grad-cam": lambda model, layer, _: GuidedGradCam(model, layer),
    "saliency": lambda model, _, __: Saliency(model),
    "input-x-gradient": lambda model, _, __: InputXGradient(model),
    "integrated-gradients": lambda model, _, __: IntegratedGradients(model),
    "guided-backprop": lambda model, _, __: GuidedBackprop(model),
    "deconvolution": lambda model, _, __: Deconvolution(model),
}
METHODS = (*_BUILDERS, "fusion-cam")


def _loosely(name: str) -> str:
    """What remains of a name when case and separators do not count: "Grad-CAM-plus-plus" is "gradcam++"."""
    bare = re.sub(r"[\s_-]", "", name.lower())
    return bare.removeprefix("layer").replace("plusplus", "++")


_BY_LOOSE_NAME = {_loosely(name): name for name in METHODS}
METRICS = ("confidence_drop", "confidence_increase", "insertion", "deletion", "pointing_game", "energy_pointing_game")
Target = Literal["predicted", "label"]
Precision = Literal["float32", "bfloat16", "float16"]
_FUSION = re.compile(r"(?:([^,():]+)|fusion\(([^,()]+),([^,()]+)\))(?::(\w+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Method:
    """A method as it is named, with its components and weighting if it fuses two."""

    name: str
    components: tuple[str, str] | None = None
    weighting: Weighting = "normalized"

    @property
    def has_percentile(self) -> bool:
        """Whether the method denoises by a percentile."""
        return self.components is not None or self.name == "union-cam"

    def build(self, model: Module, layer: Module, score_cam: Attribution) -> Attribution:
        """The attribution of a model and a layer, with the Score-CAM that the methods share."""
        if self.components is None:
            return _BUILDERS[self.name](model, layer, score_cam)
        gradient, region = (_BUILDERS[component](model, layer, score_cam) for component in self.components)
        return LayerFusionCam(model, layer, gradient_method=gradient, region_method=region)


def parse_method(text: str) -> Method:
    """A method from its name, in which case and separators do not count: "Grad-CAM" and "gradcam" are "grad-cam".

    Args:
        text (str): One of ``METHODS``, or "fusion(gradient,region)" for any two of the others; a fusion may be
            followed by ":raw" or another of its weightings.

    Returns:
        *Method*.

    Raises:
        ValueError: If there is no such method, naming the close ones.
    """
    parts = _FUSION.fullmatch("".join(text.split()))
    plain, gradient, region, weighting = parts.groups() if parts else (text, None, None, None)
    name = None if plain is None else _BY_LOOSE_NAME.get(_loosely(plain))
    if plain is not None and (name is None or (weighting is not None and name != "fusion-cam")):
        raise ValueError(
            f"There is no method {text!r}.{close_names(text.lower(), METHODS)} Expected some of {', '.join(METHODS)}, "
            "fusion(gradient,region) of two of them, or a fusion with a weighting such as fusion-cam:raw"
        )
    if name is not None and name != "fusion-cam":
        return Method(name)
    components = ("grad-cam", "score-cam")
    if name is None:
        components = (_component(str(gradient)), _component(str(region)))
        name = f"fusion({','.join(components)})"
    if weighting is None:
        return Method(name, components)
    for known in WEIGHTINGS:
        if known == weighting.lower():
            return Method(f"{name}:{known}", components, known)
    raise ValueError(f"There is no weighting {weighting!r}.{close_names(weighting, WEIGHTINGS)}")


def _component(text: str) -> str:
    name = _BY_LOOSE_NAME.get(_loosely(text))
    if name is None or name not in _BUILDERS:
        raise ValueError(f"There is no method {text!r} to fuse.{close_names(text.lower(), _BUILDERS)}")
    return name
