"""RISE."""

from math import prod
from typing import cast

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_fusion._engine.call import ModelCall
from captum_fusion._engine.captum import BaselineType, ForwardFunc, TargetType, TensorOrTupleOfTensorsGeneric, logged
from captum_fusion._engine.docstrings import fill_docstring
from captum_fusion._engine.guards import check_samples
from captum_fusion._engine.masking import masked_scorer, spatial_positions
from captum_fusion.arguments import Activation, check_activation
from captum_fusion.functional import full_precision, random_masks

# The number of masks that are added up at a time.
_SUMMED = 64


@fill_docstring
class Rise(PerturbationAttribution):
    r"""Computes RISE, which averages random masks, weighted by the probability of the masked input.

    The value of a pixel is the mean probability over the masks that keep it. A mask is a small grid of zeros and ones,
    enlarged smoothly and shifted at random. No layer and no gradients are needed. In symbols, for n masks M_i that keep
    a cell with the probability p, the probability P of the target and the baseline b:

    .. math::

        L = \frac{\sum_i P(M_i x + (1 - M_i) b) M_i}{p n}

    All examples have the same masks, which depend only on the seed, so an example has the same attribution in any
    batch. The attribution has the input's shape, with the same map in each channel.

    More details can be found in the paper: https://arxiv.org/abs/1806.07421

    Args:
        {forward_func}
        samples (int, optional): n, the number of masks, at least 1. The paper takes 4000 for VGG16 and 8000 for
            ResNet50. Default: 4000
        grid (int, optional): The number of cells along each axis, at least 1; an axis with fewer pixels has one cell
            per pixel. Default: 7
        probability (float, optional): p, the probability that a mask keeps a cell, in (0, 1). Default: 0.5
        seed (int, optional): The seed of the masks; torch's global random state is neither used nor changed. Default: 0
        {activation}

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        forward_func: ForwardFunc,
        *,
        samples: int = 4000,
        grid: int = 7,
        probability: float = 0.5,
        seed: int = 0,
        activation: Activation | None = "softmax",
    ) -> None:
        super().__init__(forward_func)
        check_samples(samples)
        check_activation(activation)
        if grid < 1:
            raise ValueError(f"grid is {grid}; expected at least 1")
        if not 0 < probability < 1:
            raise ValueError(f"probability is {probability}; expected a number in (0, 1)")
        self.samples, self.grid, self.probability, self.seed = samples, grid, probability, seed
        self.activation = activation

    @logged
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
        channel_dim: int = 1,
    ) -> TensorOrTupleOfTensorsGeneric:
        r"""Computes the attribution of the inputs.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Inputs of ``forward_func``, examples in dimension 0. The first
                floating-point input with one to three spatial axes, (N, C, \*S), and all inputs with as many spatial
                axes are masked; the others stay unmasked.
            {baselines}
            {target}
            {additional_forward_args}
            {progress_arguments}
            {channel_dim}

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions** of the input's shape, float32 or wider,
            {input_attributions}

        Raises:
            ValueError: If no input has spatial axes, if batch sizes differ, if the target does not select one score per
                example, or if another argument is outside its range.
            {masking_errors}

        Examples::

            >>> from torchvision.models import resnet18
            >>> model = resnet18(weights=None).eval()
            >>> rise = Rise(model, samples=10)
            >>> rise.attribute(torch.rand(1, 3, 64, 64), target=281).shape
            torch.Size([1, 3, 64, 64])
        """
        call = ModelCall(
            forward_func=self.forward_func,
            inputs=inputs,
            target=target,
            additional_forward_args=additional_forward_args,
            activation=self.activation,
            baselines=baselines,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            channel_dim=channel_dim,
        )
        with masked_scorer(call, positions=spatial_positions(inputs)) as scorer:
            examples, device = call.examples, call.device
            generator = torch.Generator().manual_seed(self.seed)
            axes = len(scorer.size)
            cells = [min(self.grid, *(scorer.size_of(i)[axis] for i in scorer.positions)) for axis in range(axes)]
            # Drawn on the CPU, so that they are the same on every device. The masks themselves are made when needed.
            grids = (torch.rand(self.samples, 1, *cells, generator=generator) < self.probability).to(device)
            shifts = torch.rand(self.samples, axes, generator=generator).to(device)

            def masks(rows: Tensor, position: int) -> Tensor:
                sample = torch.div(rows, examples, rounding_mode="floor")
                return random_masks(grids[sample], shifts[sample], scorer.size_of(position))

            rows = torch.arange(self.samples * examples, device=device)
            scores = scorer.masked_scores(rows % examples, masks, f"{self.get_name()} attribution")

            # Added up a few masks at a time.
            with full_precision():
                weights = scores.reshape(self.samples, examples)
                total = weights.new_zeros(examples, prod(scorer.size))
                for first in range(0, self.samples, _SUMMED):
                    part = slice(first, first + _SUMMED)
                    drawn = random_masks(grids[part], shifts[part], scorer.size)
                    total += weights[part].mT @ drawn.flatten(1).to(total)
            maps = total.reshape(examples, 1, *scorer.size) / (self.probability * self.samples)
            return cast(TensorOrTupleOfTensorsGeneric, scorer.as_attributions(maps))
