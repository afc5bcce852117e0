"""The target's probability as pixels are replaced with what their neighbours tell of them: ROAD."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import ForwardFunc, TargetType
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.forward_pass import ForwardPass, forward_pass
from captum_fusion._engine.guards import check_perturbations_per_eval
from captum_fusion._engine.masking import MaskedScorer
from captum_fusion._engine.saliency import Sign, ranks, saliency_maps
from captum_fusion.arguments import Activation
from captum_fusion.functional import impute

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
) -> Tensor:
    r"""Computes ROAD: what is left of the target's probability when pixels are removed and debiased.

    Removed pixels become a noisy mean of their neighbours (noisy linear imputation, see
    ``captum_fusion.functional.impute``), so that the model sees neither a black shape nor, from the shape, the class.
    In symbols, for the input x_q without the share q of its pixels, of which the most relevant ones go first, or the
    least relevant ones in x_q', and the probability P of the target::

        M = mean_q P(x_q)
        L = mean_q P(x_q')
        combined = (L - M) / 2

    More details can be found in the paper: https://arxiv.org/abs/2202.00449

    Args:
        {forward_func}
        {inputs}
        {attributions}
        {additional_forward_args}
        {target}
        fractions (list[float], optional): The shares of the pixels to remove, each in (0, 1); among equally relevant
            ones, the first in row order count as more relevant. Default: (0.1, 0.2, ..., 0.9)
        order (str, optional): Which pixels are removed first: the "most" relevant (lower is better), the "least"
            relevant (higher is better), or "combined" for half of their difference (higher is better).
            Default: "combined"
        noise (float, optional): The standard deviation of the noise in removed pixels, not negative. Default: 0.01
        seed (int, optional): What the noise follows from; torch's own random state is neither used nor changed.
            Default: 0
        {activation}
        {sign}
        {perturbations_per_eval}
        {show_progress}

    Returns:
        *Tensor* of shape (N,): probabilities in [0, 1], or with "combined" differences in [-0.5, 0.5].

    Raises:
        ValueError: If the attributions cannot belong to the inputs or hold NaN, if the target does not select one score
            per example, or if another argument is outside its range.
        TypeError: If an input that would be masked holds no floating-point values.
        RuntimeError: If scores are not finite.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from torchvision.models import resnet18
        >>> model = resnet18(weights=None).eval()
        >>> images = torch.rand(2, 3, 64, 64)
        >>> attributions = LayerGradCam(model, model.layer4).attribute(images, target=281)
        >>> road(model, images, attributions, target=281, fractions=[0.2, 0.5]).shape
        torch.Size([2])
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected one of {ORDERS}")
    if not len(fractions) or not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(f"fractions is {fractions!r}; expected at least one number in (0, 1)")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise is {noise}; expected a number that is not negative")
    check_perturbations_per_eval(perturbations_per_eval)
    ranked_maps = {position: ranks(maps) for position, maps in saliency_maps(inputs, attributions, sign).items()}
    call = ModelCall(forward_func, inputs, target, additional_forward_args, activation)
    call.check_rows()
    with forward_pass(call) as unmasked:
        scorer = _Imputer(unmasked, tuple(ranked_maps), perturbations_per_eval, noise, seed)
        # Each example with each fraction, most relevant first, and then least relevant first.
        orders = [order] if order != "combined" else ["most", "least"]
        count, device = len(fractions) * len(orders), call.device
        shares = torch.tensor(fractions, dtype=torch.float64, device=device).repeat(len(orders))
        least = torch.tensor([part == "least" for part in orders], device=device).repeat_interleave(len(fractions))
        examples = torch.arange(call.examples, device=device).repeat_interleave(count)
        removal = torch.arange(count, device=device).repeat(call.examples)

        def masks(rows: Tensor, position: int) -> Tensor:
            ranked, which = ranked_maps[position][examples[rows]], removal[rows]
            pixels = ranked[0].numel()
            removed = (shares[which] * pixels + 1e-6).long().reshape(-1, *(1,) * (ranked.dim() - 1))
            return torch.where(least[which].reshape(removed.shape), ranked < pixels - removed, ranked >= removed)

        scores = scorer.scores(examples, masks, "ROAD" if show_progress else None)
    means = scores.reshape(call.examples, len(orders), len(fractions)).mean(dim=2)
    return means[:, 0] if order != "combined" else (means[:, 1] - means[:, 0]) / 2


class _Imputer(MaskedScorer):
    """Scores rows whose masked pixels are imputed from the others, with noise."""

    def __init__(
        self,
        unmasked: ForwardPass,
        masked: tuple[int, ...],
        perturbations_per_eval: int | None,
        noise: float,
        seed: int,
    ) -> None:
        super().__init__(unmasked, masked, perturbations_per_eval=perturbations_per_eval)
        self._noise, self._seed = noise, seed

    def _masked(self, position: int, examples: Tensor, mask: Tensor, out: Tensor) -> Tensor:
        tensor = self.inputs[position][examples.to(self.inputs[position].device)]
        kept = mask > 0.5
        # Drawn on the CPU and the same for every row, so that it depends neither on the device nor on the batch.
        drawn = torch.randn(tensor.shape[1:], generator=torch.Generator().manual_seed(self._seed))
        noisy = impute(tensor, kept) + self._noise * drawn.to(tensor.device)
        return out.copy_(torch.where(kept, tensor, noisy))
