"""The attentions that run in the blocks of a transformer: their values and the gradients of their outputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import linear, multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from captum_fusion._engine.spatial_view import unwrap


class Attention(NamedTuple):
    r"""One run of an attention, which returns for each query a mean of the values, weighted by probabilities."""

    values: Tensor
    r"""Of each head and token, (N, h, T, d)."""
    output: Tensor
    by_head: Callable[[Tensor], Tensor]
    r"""From the gradients of the output to those of the means of values, (N, h, Q, d)."""


class Block(NamedTuple):
    """The attentions that ran in a block, and the tokens that each run of the block returned."""

    attentions: list[Attention]
    tokens: list[Tensor]


class _Recorder(TorchFunctionMode):
    """Notes the attentions of the block that runs.

    Functions rather than modules are watched: every library has attention modules of its own.
    """

    block: Block | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # The check of the tokens' order runs without gradients.
        if self.block is None or not torch.is_grad_enabled():
            return result
        if func is scaled_dot_product_attention:
            output = _with_graph(result)
            values = (args[2] if len(args) > 2 else kwargs["value"]).detach()
            if values.dim() == 4:
                # Several heads may share values.
                values = values.repeat_interleave(output.shape[1] // values.shape[1], dim=1)
            self.block.attentions.append(Attention(values, output, lambda gradients: gradients))
            # The model may go on in place.
            return output.clone()
        if func is multi_head_attention_forward:
            output = _with_graph(result[0])
            self.block.attentions.append(_of_module(output, signature(func).bind(*args, **(kwargs or {})).arguments))
            return (output.clone(), *result[1:])
        return result


def _with_graph(output: Tensor) -> Tensor:
    """The output, or a leaf in its place if neither the inputs nor the weights before it require gradients."""
    return output if output.requires_grad else output.detach().requires_grad_()


def _of_module(output: Tensor, arguments: dict[str, Any]) -> Attention:
    """The attention of ``torch.nn.MultiheadAttention``, whose output (Q, N, C) is a linear function of the heads."""
    if arguments["bias_k"] is not None or arguments["add_zero_attn"]:
        raise ValueError(
            "The attention adds keys that are no tokens (add_bias_kv or add_zero_attn); expected one without them"
        )
    heads, size, bias = (arguments[name] for name in ("num_heads", "embed_dim_to_check", "in_proj_bias"))
    weight = arguments.get("v_proj_weight")
    weight = arguments["in_proj_weight"][2 * size :] if weight is None else weight
    values = linear(arguments["value"], weight, None if bias is None else bias[2 * size :]).detach()
    out = arguments["out_proj_weight"].detach()

    def split(vectors: Tensor) -> Tensor:
        return vectors.reshape(*vectors.shape[:2], heads, -1).permute(1, 2, 0, 3)

    return Attention(split(values), output, lambda gradients: split(gradients @ out))


@contextmanager
def recorded_attention(layers: list[Module]) -> Iterator[list[Block]]:
    """Records what runs in each of the blocks, which may not lie inside each other, in passes with gradients."""
    blocks = {layer: Block([], []) for layer in layers}
    recorder = _Recorder()

    def enter(module: Module, _: object) -> None:
        recorder.block = blocks[module]

    def leave(module: Module, _: object, output: Any) -> None:
        recorder.block = None
        if torch.is_grad_enabled() and isinstance(tokens := unwrap(output), Tensor):
            # The next block may work in place.
            blocks[module].tokens.append(tokens.clone())

    hooks = [layer.register_forward_pre_hook(enter) for layer in blocks]
    hooks += [layer.register_forward_hook(leave, always_call=True) for layer in blocks]
    try:
        with recorder:
            yield [blocks[layer] for layer in layers]
    finally:
        for hook in hooks:
            hook.remove()
