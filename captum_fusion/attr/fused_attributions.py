"""Several attributions, such as those of several layers, fused into one."""

from collections.abc import Sequence
from typing import cast

import torch
from captum.attr import Attribution

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType, TensorOrTupleOfTensorsGeneric, logged
from captum_fusion._engine.component import check_component, component_maps
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.masking import masked_scorer, spatial_positions
from captum_fusion.arguments import InterpolateMode
from captum_fusion.functional import MAP_FUSIONS, MapFusion, fuse_maps


@fill_docstring
class FusedAttributions(Attribution):
    r"""Fuses the maps of several attributions of one model, such as the class activation maps of several layers.

    Each attribution is summed over its channels, its negative values are set to 0, and the result is interpolated to
    the input's size and normalized to [0, 1]. In symbols, for these maps m_k, pixel by pixel, one of:

    .. math::

        L &= N(\mathrm{mean}_k m_k) \\
        L &= N(\max_k m_k) \\
        L &= N(\prod_k m_k)

    The mean is the fusion of layers in pytorch-grad-cam. The maximum, a union, is that of torchcam. The product is
    RefineCAM (https://arxiv.org/abs/2605.14641): it keeps only regions where all maps are high, so that sharp early
    layers refine coarse late ones.

    The attribution has the input's shape, as that of ``captum.attr.GuidedGradCam`` does. ``LayerFusionCam`` accepts a
    ``FusedAttributions`` as a component.

    Args:
        attribution_methods (list[Attribution]): At least one attribution of Captum or of this package, all of the same
            model.
        fusion (str, optional): The fusion of the maps: "mean", "maximum" or "product". Default: "mean"

    Raises:
        ValueError: If the list is empty, if the attributions explain different models, or if the fusion is unknown.
        TypeError: If an entry is not an attribution.
    """

    def __init__(self, attribution_methods: Sequence[Attribution], fusion: MapFusion = "mean") -> None:
        if fusion not in MAP_FUSIONS:
            raise ValueError(f"fusion is {fusion!r}; expected one of {MAP_FUSIONS}")
        if isinstance(attribution_methods, Attribution) or not len(attribution_methods):
            raise ValueError(
                f"attribution_methods is {attribution_methods!r}; expected a list of at least one attribution"
            )
        self.attribution_methods = list(attribution_methods)
        self.fusion = fusion
        forward_func = getattr(self.attribution_methods[0], "forward_func", None)
        for position, method in enumerate(self.attribution_methods):
            check_component(f"attribution_methods[{position}]", method, forward_func)
        super().__init__(cast(ForwardFunc, forward_func))

    @logged
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object = None,
        interpolate_mode: InterpolateMode = "bilinear",
        attribute_to_layer_input: bool = False,
        *,
        baselines: BaselineType = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        channel_dim: int = 1,
    ) -> TensorOrTupleOfTensorsGeneric:
        r"""Computes the attribution of the inputs. Each argument reaches every attribution that takes it.

        If an attribution has one map per input, each input keeps its own map.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0. The first
                floating-point input with one to three spatial axes, (N, C, \*S), and all inputs with as many spatial
                axes are explained.
            {target}
            {additional_forward_args}
            {interpolate_mode}
            {attribute_to_layer_input}
            {baselines}
            {progress_arguments}
            {channel_dim}

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions** of the input's shape, float32 or wider, in [0, 1],
            {input_attributions}

        Raises:
            ValueError: If no input has spatial axes, or if an attribution has another number of spatial axes.
            RuntimeError: If an attribution needs gradients inside ``torch.inference_mode()``.

        Examples::

            >>> from captum.attr import LayerGradCam
            >>> from torchvision.models import resnet18
            >>> model = resnet18(weights=None).eval()
            >>> layers = [model.layer2, model.layer3, model.layer4]
            >>> fused = FusedAttributions([LayerGradCam(model, layer) for layer in layers], fusion="product")
            >>> fused.attribute(torch.rand(1, 3, 64, 64), target=281).shape
            torch.Size([1, 3, 64, 64])
        """
        call = ModelCall(
            forward_func=self.forward_func,
            inputs=inputs,
            target=target,
            additional_forward_args=additional_forward_args,
            baselines=baselines,
            attribute_to_layer_input=attribute_to_layer_input,
            interpolate_mode=interpolate_mode,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            channel_dim=channel_dim,
        )
        with masked_scorer(call, positions=spatial_positions(inputs)) as scorer:
            components = enumerate(self.attribution_methods)
            maps = scorer.on_same_inputs(
                *(component_maps(scorer, f"attribution_methods[{i}]", m) for i, m in components)
            )
            fused = {i: fuse_maps(torch.cat([own[i] for own in maps], dim=1), self.fusion) for i in maps[0]}
            attributions = scorer.as_attributions(fused)
        return cast(TensorOrTupleOfTensorsGeneric, attributions)
