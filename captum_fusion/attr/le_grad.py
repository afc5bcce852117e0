"""LeGrad."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import torch
from captum.attr import GradientAttribution, LayerAttribution
from torch import Tensor
from torch.nn import Module

from captum_fusion._engine.attention import Block, recorded_attention
from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import ForwardFunc, TargetType, logged
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import forward_pass
from captum_fusion._engine.guards import check_gradients_allowed, check_layer
from captum_fusion._engine.spatial_view import attach_view
from captum_fusion.functional import le_grad_map


@fill_docstring
class LayerLeGrad(LayerAttribution, GradientAttribution):
    r"""Computes LeGrad for blocks of a vision transformer: the positive gradients of their attention probabilities.

    The map shows the tokens to which more attention would increase the score of the class. In symbols, for the tokens
    Z of a block l, the classifier C, and the attention probability a from token i to token j in the head h:

    .. math::

        g_{lhij} &= \frac{\partial C(Z_l)}{\partial a_{lhij}} \\
        L_j &= \mathrm{mean}_{lhi}(\mathrm{ReLU}(g_{lhij}))

    Each block has a score of its own: the classifier of the model, applied to the tokens of that block. The
    probabilities themselves are not needed, so fused attention, which returns none, is supported: their gradients
    follow from the values and from the gradients of what the attention returns.

    More details can be found in the paper: https://arxiv.org/abs/2404.03214

    Args:
        {forward_func}
        layer (torch.nn.Module or list[torch.nn.Module]): The block or the blocks of the transformer, each with one
            attention over all tokens. A block returns tokens (N, T, C), the class token and registers first.
        {device_ids}
        head (Callable): The classifier, a function of tokens (N, T, C) that gives scores (N, classes). The authors
            apply the last normalization and the linear classifier of the model to the mean of all tokens.
        grid (tuple[int, ...], optional): The spatial shape s of the tokens, see ``captum_fusion.spatial_view``.
            Default: None, which infers the grid

    Examples::

        >>> from torchvision.models import VisionTransformer
        >>> model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
        >>> def head(tokens):
        ...     return model.heads(model.encoder.ln(tokens.mean(dim=1)))
        >>> le_grad = LayerLeGrad(model, list(model.encoder.layers), head=head)
        >>> le_grad.attribute(torch.rand(1, 3, 32, 32), target=281).shape
        torch.Size([1, 1, 4, 4])
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        layer: Module | Sequence[Module],
        device_ids: list[int] | None = None,
        *,
        head: Callable[[Tensor], Tensor],
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(forward_func, cast(Any, layer), device_ids)
        self.head = head
        self.grid = grid

    @logged
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
    ) -> Tensor:
        r"""Computes the mean of the blocks' maps.

        Args:
            {inputs}
            target (int, tuple, Tensor, or list, optional): The index of the score of ``head`` to explain, in any form
                that ``captum.attr.LayerGradCam`` takes. Default: None
            {additional_forward_args}

        Returns:
            *Tensor* of **attributions** of shape (N, 1, \*s), not negative, float32 or wider. Use
            ``LayerAttribution.interpolate`` to enlarge them to the input's size.

        Raises:
            TypeError: If the layer is neither a module nor a list of modules.
            ValueError: If a block has no or several attentions over all its tokens, if the attention is computed in
                single steps by the model's own code, if the grid cannot be inferred or the tokens are not in row
                order, or if the target does not select one score per example.
            {gradient_errors}
        """
        check_gradients_allowed(type(self).__name__)
        layers = [check_layer(layer) for layer in ([self.layer] if isinstance(self.layer, Module) else self.layer)]
        if not layers:
            raise TypeError("layer is an empty list; expected at least one block")
        with recorded_attention(layers) as blocks, attach_view(layers[-1], self.grid) as view:
            call = ModelCall(self.forward_func, inputs, target, additional_forward_args, layer=view.module)
            with forward_pass(call, with_graph=True, scored=False) as unmasked, torch.enable_grad():
                maps = [self._map(call, layer, block) for layer, block in zip(layers, blocks, strict=True)]
        size = unmasked.layer_value.shape[2:]
        tokens = torch.stack(maps).mean(dim=0)
        return tokens[:, tokens.shape[1] - prod(size) :].reshape(-1, 1, *size)

    def _map(self, call: ModelCall, layer: Module, block: Block) -> Tensor:
        """The map of one block over all its tokens, (N, T)."""
        if (len(block.attentions), len(block.tokens)) != (1, 1):
            raise ValueError(
                f"{len(block.attentions)} attentions ran in {len(block.tokens)} runs of the {type(layer).__name__}; "
                "expected one, by torch.nn.MultiheadAttention or torch.nn.functional.scaled_dot_product_attention. "
                "Pass a transformer block itself, and load models with fused attention, such as Hugging Face's with "
                "attn_implementation='sdpa'."
            )
        (tokens,), (attention,) = block.tokens, block.attentions
        if attention.values.shape[:3:2] != tokens.shape[:2]:
            raise ValueError(
                f"The attention of the {type(layer).__name__} has values {tuple(attention.values.shape)} for tokens "
                f"{tuple(tokens.shape)}; expected values of each token, and no windows or pooled tokens"
            )
        scores = self.head(tokens)
        call.checked_scores(scores)
        (gradients,) = torch.autograd.grad(call.explained(scores).sum(), attention.output, retain_graph=True)
        return le_grad_map(attention.by_head(gradients), attention.values)
