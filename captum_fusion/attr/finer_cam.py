"""Finer-CAM."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.captum import ForwardFunc, TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import compared_classes
from captum_fusion.attr.gradient_cam import GradientCam
from captum_fusion.functional import finer_scores, grad_cam_weights, weighted


@fill_docstring
class LayerFinerCam(GradientCam):
    r"""Computes Finer-CAM for the chosen layer, which distinguishes the target from the most similar classes.

    The map is a gradient class activation map, Grad-CAM by default, of a difference: the target's score minus the mean
    score of the classes with the closest scores. In symbols, for the scores y of an example, the target c and the
    classes d with the closest scores, it explains:

    .. math::

        y_c - \gamma \mathrm{mean}_d y_d

    The mean is the paper's; pytorch-grad-cam weights the classes by their softmax, with a gamma of 1. Dimension 1 of
    the output holds the classes. If the output has further dimensions, only the classes at the target's position are
    compared. Classes that a mask rules out are excluded: their scores are below -5000 and below -10 times the target's
    absolute score. A warning names such scores if fewer than T classes remain and if they may be logits, above -1e9.

    More details can be found in the paper: https://arxiv.org/abs/2501.11309

    Args:
        {layer_constructor}
        method (type, optional): The gradient method, a class of this package such as
            ``LayerGradCamPlusPlus`` or ``LayerLayerCam``. Default: None, which means Grad-CAM
        strength (float, optional): gamma, the weight of the other classes, not negative; with 0 the map is that of the
            method itself. Default: 0.6
        references (int, optional): T, the number of classes to compare with, at least 1; all other classes if the
            output has fewer. Default: 3

    Raises:
        TypeError: If the method is not a method of this package with first gradients and a map at the layer's
            resolution.
        ValueError: If strength or references are outside their range.

    Examples::

        >>> import torch
        >>> from captum_fusion import LayerLayerCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> finer_cam = LayerFinerCam(model, model.layer4, method=LayerLayerCam)
        >>> finer_cam.attribute(torch.rand(1, 3, 64, 64), target=281).shape
        torch.Size([1, 1, 2, 2])
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        method: type[GradientCam] | None = None,
        strength: float = 0.6,
        references: int = 3,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        is_gradient_cam = method is None or (isinstance(method, type) and issubclass(method, GradientCam))
        if not is_gradient_cam or (method and (method.uses_hessian or not method.uses_gradients)):
            raise TypeError(
                f"method is {method!r}; expected a class of captum_fusion's methods of first gradients at the "
                "layer's resolution, such as LayerGradCamPlusPlus, or None for Grad-CAM"
            )
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; expected a number that is not negative")
        if references < 1:
            raise ValueError(f"references is {references}; expected at least 1")
        self.method, self.strength, self.references = method, strength, references

    def channel_maps(self, gradients: Tensor, activations: Tensor) -> Tensor:
        """The channel maps of the method."""
        if self.method is None:
            return weighted(activations, grad_cam_weights(gradients))
        return self.method(self.forward_func, self.layer).channel_maps(gradients, activations)

    def explained_scores(self, output: Tensor, target: TargetType) -> Tensor:
        """The difference between the target's score and the mean score of the closest classes."""
        if output.dim() < 2 or output.shape[1] < 2:
            raise ValueError(
                f"forward_func returned an output of shape {tuple(output.shape)}; expected at least two classes in "
                "dimension 1, to compare"
            )
        targets: Any = target
        if isinstance(targets, Tensor):
            targets = targets.flatten().tolist() * (len(output) // targets.numel())
        differences = []
        for example, index in enumerate(targets if isinstance(targets, list) else [targets] * len(output)):
            chosen, *place = index if isinstance(index, tuple) else (index,)
            classes = output[example][(slice(None), *place)]
            others = classes[torch.arange(len(classes), device=classes.device) != chosen % len(classes)]
            others = compared_classes(others, classes[chosen], self.references, example)
            differences.append(finer_scores(classes[chosen, None], others[None], self.strength, self.references))
        return torch.cat(differences)
