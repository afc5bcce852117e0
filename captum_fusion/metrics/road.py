"""ROAD: the target's probability as pixels are replaced with values imputed from their neighbours."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import ForwardFunc, TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_replace
from captum_fusion._engine.masking import Masks, Perturbation, Replace, Replacement, masked_scorer
from captum_fusion._engine.saliency import ranks, saliency_maps
from captum_fusion.arguments import Activation, Sign
from captum_fusion.functional import impute
from captum_fusion.functional._numerics import broadcast_to

Order = Literal["combined", "most", "least"]
ORDERS: tuple[Order, ...] = get_args(Order)
_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@fill_docstring
def road(
    forward_func: ForwardFunc,
    inputs: Tensor | tuple[Tensor, ...],
    attributions: Tensor | tuple[Tensor | None, ...],
    additional_forward_args: object = None,
    target: TargetType = None,
    fractions: Sequence[float] = _FRACTIONS,
    order: Order = "combined",
    noise: float = 0.01,
    seed: int = 0,
    activation: Activation | None = "softmax",
    sign: Sign = "positive",
    perturbations_per_eval: int | None = None,
    show_progress: bool = False,
    *,
    replace: Replace | None = None,
    channel_dim: int = 1,
) -> Tensor:
    r"""Computes ROAD, the mean probability of the target as removed pixels are imputed from their neighbours.

    Removed pixels become a noisy mean of their neighbours (noisy linear imputation, see
    ``captum_fusion.functional.impute``), so that the shape of the removed region does not reveal the class. In symbols,
    for the input x_q without the share q of its most relevant pixels, the input x_q' without the share q of its least
    relevant pixels, and the probability P of the target:

    .. math::

        M &= \mathrm{mean}_q P(x_q) \\
        L &= \mathrm{mean}_q P(x_q') \\
        \mathrm{combined} &= \frac{L - M}{2}

    More details can be found in the paper: https://arxiv.org/abs/2202.00449

    Args:
        {forward_func}
        {inputs}
        {attributions}
        {additional_forward_args}
        {target}
        fractions (list[float], optional): The shares of the pixels to remove, each in (0, 1). Among equally relevant
            pixels, the first in row order count as more relevant. Default: (0.1, 0.2, ..., 0.9)
        order (str, optional): The pixels to remove first: the "most" relevant (lower is better), the "least" relevant
            (higher is better), or "combined" for half of the difference (higher is better). Default: "combined"
        noise (float, optional): The standard deviation of the noise in removed pixels, not negative. Default: 0.01
        seed (int, optional): The seed of the noise; torch's global random state is neither used nor changed. Default: 0
        {activation}
        {sign}
        {progress_arguments}
        {replace}
            Default: None, which means noisy linear imputation; ``noise`` and ``seed`` apply to it alone
        {channel_dim}

    Returns:
        *Tensor* of shape (N,): probabilities in [0, 1], or with "combined" differences in [-0.5, 0.5].

    Raises:
        {metric_errors}

    Examples::

        {attributions_example}
        >>> road(model, images, attributions, target=281, fractions=[0.2, 0.5]).shape
        torch.Size([2])

        With the mean colour of each image instead of imputation:

        >>> def mean_colour(inputs, removed):
        ...     return inputs.mean(dim=(2, 3), keepdim=True).expand_as(inputs)
        >>> road(model, images, attributions, target=281, fractions=[0.2, 0.5], replace=mean_colour).shape
        torch.Size([2])
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected one of {ORDERS}")
    if not len(fractions) or not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(f"fractions is {fractions!r}; expected at least one number, each in (0, 1)")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise is {noise}; expected a number that is not negative")
    check_replace(replace, None)
    call = ModelCall(
        forward_func,
        inputs,
        target,
        additional_forward_args,
        activation,
        None,
        perturbations_per_eval,
        show_progress,
        channel_dim=channel_dim,
    )
    orders: tuple[Order, ...] = ("most", "least") if order == "combined" else (order,)
    means = road_of(call, saliency_maps(call, attributions, sign), orders, fractions, noise, seed, replace)
    return (means["least"] - means["most"]) / 2 if order == "combined" else means[order]


def road_of(
    call: ModelCall,
    maps: dict[int, Tensor],
    orders: Sequence[Order] = ("most", "least"),
    fractions: Sequence[float] = _FRACTIONS,
    noise: float = 0.01,
    seed: int = 0,
    replace: Replace | None = None,
) -> dict[Order, Tensor]:
    """The mean probability over the removed fractions for each order, (N,)."""
    ranked_maps = {position: ranks(saliency) for position, saliency in maps.items()}
    left = {position: saliency.isnan() for position, saliency in maps.items()}
    # Each example with each fraction in each order.
    count = len(fractions) * len(orders)
    shares = torch.tensor(fractions, dtype=torch.float64, device=call.device).repeat(len(orders))
    least = torch.tensor([order == "least" for order in orders], device=call.device)
    least = least.repeat_interleave(len(fractions))
    examples = torch.arange(call.examples, device=call.device).repeat_interleave(count)
    removal = torch.arange(count, device=call.device).repeat(call.examples)

    def masks(rows: Tensor, position: int) -> Tensor:
        ranked, which = ranked_maps[position][examples[rows]], removal[rows]
        pixels = ranked[0].numel()
        removed = broadcast_to((shares[which] * pixels + 1e-6).long(), ranked)
        kept = torch.where(least[which].reshape(removed.shape), ranked < pixels - removed, ranked >= removed)
        return kept | left[position][examples[rows]]

    positions = tuple(maps)
    filling: Perturbation = _Imputation(call, masks, positions, noise, seed)
    if replace is not None:
        filling = Replacement(call, positions, masks, replace)
    with masked_scorer(call, positions=positions) as scorer:
        scores = scorer.scores(examples, filling, "ROAD")
    means = scores.reshape(call.examples, len(orders), len(fractions)).mean(dim=2)
    return dict(zip(orders, means.unbind(dim=1), strict=True))


class _Imputation(Perturbation):
    """Replaces the pixels that a mask removes with what their neighbours suggest, and noise."""

    def __init__(self, call: ModelCall, masks: Masks, positions: tuple[int, ...], noise: float, seed: int) -> None:
        self.call, self.masks, self.positions, self.noise, self.seed = call, masks, positions, noise, seed

    def fill(self, position: int, rows: Tensor, examples: Tensor, out: Tensor) -> None:
        """Imputes one input."""
        tensor = self.call.tensors[position].detach()[examples]
        kept = self.masks(rows, position).to(tensor.device)
        # Drawn on the CPU and the same for every row, so that it depends neither on the device nor on the batch.
        drawn = torch.randn(tensor.shape[1:], generator=torch.Generator().manual_seed(self.seed))
        out.copy_(torch.where(kept, tensor, impute(tensor, kept) + self.noise * drawn.to(tensor.device)))
