"""Group-CAM."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import relu

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType, TensorOrTupleOfTensorsGeneric, logged
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_gradients_allowed
from captum_fusion._engine.masking import MaskedScorer, masked_scorer
from captum_fusion.arguments import Activation, InterpolateMode
from captum_fusion.attr.masked_cam import MaskedCam
from captum_fusion.functional import contribution, group_maps, normalize, weighted_sum

# The kernel size and sigma of the code released with the paper, in pixels; the Fusion-CAM comparison has a sigma of 25.
_BLUR = (51, 50.0)
_GROUPS = 32


@fill_docstring
class LayerGroupCam(MaskedCam):
    r"""Computes Group-CAM, which scores groups of the chosen layer's channels as masks.

    The channels, weighted by their mean gradients as in Grad-CAM, are summed within groups of consecutive channels.
    Each group's map masks the input; the masked parts are blurred. The weight of the group is the gain in probability
    over the blurred input. In symbols, for channels A_k, gradients g, the blurred input b, the probability P of the
    target and groups j:

    .. math::

        M_j &= N(U(\mathrm{ReLU}(\sum_{k \in j} \mathrm{mean}(g_k) A_k))) \\
        s_j &= \mathrm{ReLU}(P(M_j x + (1 - M_j) b) - P(b)) \\
        L &= \sum_j s_j M_j

    The attribution has the input's shape, as that of ``captum.attr.GuidedGradCam`` does. The paper also denoises the
    groups' maps; this class follows the comparison in the Fusion-CAM paper, which does not. The blur is that of the
    code released with Group-CAM, a kernel of 51 pixels with a sigma of 50; the comparison has a sigma of 25.

    More details can be found in the paper: https://arxiv.org/abs/2103.13859

    Args:
        {layer_constructor}
        groups (int, optional): The number of groups, from 1 to the layer's number of channels. If the channels cannot
            be divided evenly, the first groups have one channel more. Default: None, which means 32, or the number of
            channels if that is smaller
        {activation}

    Raises:
        ValueError: If the number of groups is below 1 or the activation is unknown.
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module,
        device_ids: list[int] | None = None,
        *,
        groups: int | None = None,
        activation: Activation | None = "softmax",
    ) -> None:
        super().__init__(forward_func, layer, device_ids, activation=activation)
        if groups is not None and groups < 1:
            raise ValueError(f"groups is {groups}; expected at least 1")
        self.groups = groups

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
        r"""Computes the attribution of the inputs.

        Args:
            {masked_arguments}
            baselines (Tensor, number, or tuple, optional): The values that replace masked-out values: a number, a
                tensor of the input's shape or with one example, or for a tuple of inputs a tuple of these.
                Default: None, which means the input blurred by a Gaussian of 51 pixels with a standard deviation of 50
            {progress_arguments}
            {channel_dim}

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions** of the input's shape, float32 or wider, not negative,
            {input_attributions}

        Raises:
            {layer_errors}
            {masking_errors}
            RuntimeError: Inside ``torch.inference_mode()``.

        {input_example}
        """
        check_gradients_allowed(type(self).__name__)
        call = ModelCall.of_layer(
            self, inputs, target, additional_forward_args, attribute_to_layer_input, self.activation, interpolate_mode
        ).masked(baselines, perturbations_per_eval, show_progress, channel_dim, _BLUR)
        with masked_scorer(call, with_gradients=True) as scorer:
            activations = scorer.forward_pass.layer_value.detach()
            channels = activations.shape[1]
            groups = min(_GROUPS, channels) if self.groups is None else self.groups
            if groups > channels:
                raise ValueError(f"groups is {groups}; expected at most {channels}, the number of the layer's channels")
            maps = group_maps(scorer.forward_pass.layer_gradients, activations, groups)
            scores = self._group_scores(scorer, maps)
        masks = torch.cat([normalize(scorer.upsample(part)) for part in maps.tensor_split(groups, dim=1)], dim=1)
        return cast(TensorOrTupleOfTensorsGeneric, scorer.as_attributions(weighted_sum(masks, scores)))

    def _group_scores(self, scorer: MaskedScorer, maps: Tensor) -> Tensor:
        """Computes the gain of each group over the probability of the baseline, (N, groups), not negative."""
        # A constant map is normalized to zeros, which leave the baseline: one more row scores it.
        lowest, highest = torch.aminmax(maps.flatten(2), dim=2)
        varying = lowest < highest
        masked = torch.cat([maps, torch.zeros_like(maps[:, :1])], dim=1)
        examples, group = torch.cat([varying, torch.ones_like(varying[:, :1])], dim=1).nonzero(as_tuple=True)

        def masks(rows: Tensor, position: int) -> Tensor:
            return normalize(scorer.upsample(masked[examples[rows], group[rows]].unsqueeze(1), position))

        row_scores = scorer.masked_scores(examples, masks, f"{self.get_name()} attribution")
        scores = row_scores.new_zeros(masked.shape[:2])
        scores[examples, group] = row_scores
        scale = scorer.forward_pass.scale.unsqueeze(1)
        return relu(contribution(scores[:, :-1], scores[:, -1:], scale)) * varying
