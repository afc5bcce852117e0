r"""Score-CAM's weights from the scores of a few channels: the regression, what to score next, and when to stop.

Nothing here knows of models: activations and scores come in, weights and an error estimate come out.
"""

from math import pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, relu

from captum_fusion.functional import full_precision

# The kernel's bias, and the slopes and noise variances, of which the likeliest pair is used; above _MOST_FITTED known
# scores the pair is fixed. These constants and those below were chosen on the images of benchmarks/results/tolerance.md
# that its table leaves out.
_BIAS = 10.0
_SLOPES = (1.5, 6.0, 24.0)
_NOISES = (1e-3, 1e-2)
_MOST_FITTED = 512
# The number of draws of the scores, and the number of units of the random networks that produce them.
_DRAWS = 256
_UNITS = 512
# The size of the first batch of channels, the smallest size of a later one, and its largest share of the known scores.
_FIRST = 8
_FEWEST = 4
_GROWTH = 0.3
# The error estimate is this quantile over the draws, times a factor: the draws underestimate the error, because the
# search ends at the moment at which they are most certain.
_QUANTILE = 0.9
_SAFETY_FACTOR = 1.65
# The channels among which a batch is chosen.
_CANDIDATES = 512
# Masks and final maps are compared at about 200 pixels at most: this many along each of one, two or three axes.
_LONGEST = {1: 196, 2: 14, 3: 6}


class Surrogate:
    r"""The scores of one example's channels for T targets: some are known, the others are inferred.

    The score is taken for a smooth function of the mask. Prior: a Gaussian process with ``kernel``; the slope, the
    noise, the mean and the variance are the likeliest ones. Posterior: draws by Matheron's rule, that is draws from
    the prior, here random networks, corrected so that they agree with the known scores. The weights are the mean over
    the draws of softmax(s). The error of a target's final map (ReLU, then min-max) is estimated by a high quantile,
    over the draws, of the largest difference between the draw's final map and that of the weights.

    Args:
        activations (Tensor): A of one example, (C, \*s), float32 or wider.
        blank (Tensor): The scores of the mask of zeros, (T,), which are those of constant channels too.
        whole (Tensor): The scores of the mask of ones, (T,).
        tolerance (float): How large the errors may be, above 0.
    """

    weights: Tensor
    """w, (T, C)."""
    errors: Tensor
    """Estimates of how far each target's final map is from the exact one, (T,); 0 where every score is known."""

    @full_precision()
    def __init__(self, activations: Tensor, blank: Tensor, whole: Tensor, tolerance: float) -> None:
        # The weights do not depend on the scale; sums and products of values near the limits of the type do.
        largest = activations.abs().amax()
        activations = activations / torch.where(largest > 0, largest, 1)
        lowest, highest = torch.aminmax(activations.flatten(1), dim=1)
        self._tolerance = tolerance
        self._varying = lowest < highest
        # Draws are compared by their maps at a small size, at which many maps cost little.
        maps = pooled(activations)
        # All constant channels are one with their mean map, whose weight is that of all of them.
        self._constant = (~self._varying).sum()
        self._maps = torch.cat(
            [maps[self._varying], maps[~self._varying].sum(0, keepdim=True) / self._constant.clamp(min=1)]
        )
        self._constant_score = blank.to(maps) + self._constant.to(maps).log()
        # The last two masks are the blank and the whole.
        self._features = features(maps[self._varying], lowest[self._varying], highest[self._varying])
        count, width = self._features.shape
        self._scores = torch.cat([blank.new_zeros(count - 2, len(blank)), torch.stack([blank, whole])])
        self._known = torch.tensor([count - 2, count - 1], device=maps.device)
        self._likeliest = (_SLOPES[0], _NOISES[0])
        generator = torch.Generator().manual_seed(0)

        def standard_normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(maps)

        self._inner = self._features @ standard_normal(width, _UNITS)
        self._biases = _BIAS**0.5 * standard_normal(_UNITS)
        self._outer = standard_normal(_UNITS, _DRAWS) / _UNITS**0.5
        self._noise = standard_normal(count, _DRAWS)
        self._networks: dict[float, Tensor] = {}
        self._infer()

    @property
    def done(self) -> bool:
        """Whether all errors are within the tolerance."""
        return bool((self.errors <= self._tolerance).all())

    @full_precision()
    def propose(self) -> Tensor:
        """The channels to score next."""
        known = len(self._known) - 2
        # Errors fall about as one over the number of known scores; half of what is missing, not to score too many.
        missing = known * (float(self.errors.max()) / self._tolerance - 1) / 2
        count = max(_FEWEST, min(int(missing), int(_GROWTH * known), _DRAWS // 2)) if known else _FIRST
        rows = self._unknown
        if count < len(rows):
            rows = rows[most_informative(self._draws, self._final_maps, count)]
        return self._varying.nonzero().squeeze(1)[rows]

    @full_precision()
    def observe(self, channels: Tensor, scores: Tensor) -> None:
        """Takes in the scores of n more channels, (n, T)."""
        rows = self._varying.cumsum(0)[channels] - 1
        self._scores[rows] = scores.to(self._scores)
        self._known = torch.cat([self._known, rows])
        self._infer()

    def _infer(self) -> None:
        """Infers the weights and their errors from the scores so far, with draws of scores and of final maps."""
        unknown = torch.ones(len(self._features), dtype=torch.bool, device=self._known.device)
        unknown[self._known] = False
        self._unknown = unknown.nonzero().squeeze(1)
        if not len(self._unknown):
            exact = torch.cat([self._scores[:-2], self._constant_score[None]]).T.softmax(dim=1)
            self.weights, self.errors = self._of_all_channels(exact), exact.new_zeros(len(exact))
            return
        mean, deviation = self._posterior()
        # Scores that differ from draw to draw, then those that do not: the known ones and that of constant channels.
        known = self._known[self._known < len(self._features) - 2]
        order = torch.cat([self._unknown, known, known.new_tensor([len(self._features) - 2])])
        fixed = torch.cat([self._scores[known], self._constant_score[None]]).to(mean).T
        channel_maps = self._maps[order]
        weights, errors, final_maps = [], [], []
        for target in range(len(mean)):
            varying = torch.add(mean[target], self._draws, alpha=float(deviation[target]))
            drawn = torch.cat([varying, fixed[target].expand(_DRAWS, -1)], dim=1).softmax(dim=1)
            maps = relu_minmax(drawn @ channel_maps)
            drawn = drawn.mean(dim=0)
            distances = (maps - relu_minmax(drawn @ channel_maps)).abs().amax(dim=1)
            # The blank and the whole alone, and scores that are all the same, do not tell how far others may be.
            # Neither does an estimate that is not a number, as of scores that overflow.
            estimate = _SAFETY_FACTOR * distances.quantile(_QUANTILE)
            informed = (deviation[target] > 0) & (len(self._known) > 2) & estimate.isfinite()
            errors.append(torch.where(informed, estimate, 1).clamp(max=1))
            weights.append(torch.empty_like(drawn).index_copy(0, order, drawn))
            if errors[-1] > self._tolerance:
                final_maps.append(maps)
        self.weights, self.errors = self._of_all_channels(torch.stack(weights)), torch.stack(errors)
        self._final_maps = torch.cat(final_maps, dim=1) if final_maps else maps

    def _posterior(self) -> tuple[Tensor, Tensor]:
        """The mean of the unknown scores, (T, U), and their scale, (T,), in which draws, (_DRAWS, U), are kept."""
        features, values = self._features[self._known], self._scores[self._known]
        # The scored channels are few, so that float64, which not every device has, is cheap on the CPU.
        exact, exact_values = features.cpu().double(), values.cpu().double()
        pairs = [(slope, noise) for slope in _SLOPES for noise in _NOISES]
        if not 2 < len(exact) <= _MOST_FITTED:
            pairs = [self._likeliest]
        best = max((fit(exact, exact_values, *pair) for pair in pairs), key=lambda each: each.likelihood)
        slope, noise = self._likeliest = best.slope, best.noise
        if slope not in self._networks:
            self._networks[slope] = torch.erf(slope**0.5 * self._inner + self._biases) @ self._outer
        prior = self._networks[slope] + noise**0.5 * self._noise
        # inv(K) y and inv(K) times the draws of the known scores, of which k(unknown, known) makes what they explain.
        drawn = torch.linalg.solve_triangular(best.factor, prior[self._known].cpu().double(), upper=False)
        known = torch.linalg.solve_triangular(best.factor.T, torch.cat([best.residual, drawn], dim=1), upper=True)
        explained = kernel(self._features[self._unknown], features, slope) @ known.to(prior)
        targets = values.shape[1]
        self._draws = (prior[self._unknown] - explained[:, targets:]).T
        same = (values == values[0]).all(dim=0)
        mean, variance = best.mean.to(prior), best.variance.to(prior)
        return mean[:, None] + explained[:, :targets].T, torch.where(same, 0, variance.sqrt())

    def _of_all_channels(self, weights: Tensor) -> Tensor:
        everywhere = (weights[:, -1:] / self._constant.clamp(min=1)).repeat(1, len(self._varying))
        everywhere[:, self._varying] = weights[:, :-1]
        return everywhere


class Fit(NamedTuple):
    """A Gaussian process fitted to n scores: K + noise = L L', y the scores less their mean."""

    slope: float
    noise: float
    factor: Tensor
    """L, (n, n)."""
    mean: Tensor
    """(T,)."""
    residual: Tensor
    """inv(L) y, (n, T)."""
    variance: Tensor
    """The scale of the process, (T,)."""
    likelihood: float
    """Its logarithm up to a constant, with the likeliest mean and variance."""


def fit(features: Tensor, scores: Tensor, slope: float, noise: float) -> Fit:
    """Fits the mean and the variance of a Gaussian process to scores, (n, T), with one kernel for all targets."""
    covariance = kernel(features, features, slope)
    covariance.diagonal().add_(noise)
    factor = torch.linalg.cholesky(covariance)
    ones = torch.ones_like(scores[:, :1])
    whitened = torch.linalg.solve_triangular(factor, torch.cat([ones, scores], dim=1), upper=False)
    one, rest = whitened[:, :1], whitened[:, 1:]
    mean = (one * rest).sum(dim=0) / one.square().sum()
    residual = rest - one * mean
    variance = residual.square().mean(dim=0)
    likelihood = -len(scores) / 2 * variance.log().sum() - scores.shape[1] * factor.diagonal().log().sum()
    return Fit(slope, noise, factor, mean, residual, variance, float(likelihood))


def features(maps: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    r"""phi(m) = C^(1/4) sqrt(m) of each channel's mask, of the mask of zeros and of that of ones, (K + 2, pixels).

    C = sum_k A_k A_k' stresses the pixels where the layer is active; the square root, that a network sees what a mask
    dims. The channels' features have a mean square length of 1.

    The maps are A of channels that are not constant, as ``pooled`` gives it, (K, pixels). The lowest and the highest
    values, (K,), are those of A itself.
    """
    masks = ((maps - lowest[:, None]) / (highest - lowest)[:, None]).clamp(0, 1)
    exact = (maps.T @ maps).cpu().double()
    values, vectors = torch.linalg.eigh(exact)
    stress = ((vectors * values.clamp(min=0) ** 0.25) @ vectors.T).to(maps)
    ends = masks.new_tensor([[0.0], [1.0]]).expand(2, masks.shape[1])
    stressed: Tensor = torch.cat([masks, ends]).sqrt() @ stress
    return stressed / stressed[:-2].square().sum(dim=1).mean().sqrt()


def kernel(first: Tensor, second: Tensor, slope: float) -> Tensor:
    """The kernel of a wide network with one layer (Williams, 1998, "Computation with infinite neural networks").

    k(a, b) = 2/pi asin(2 <a, b> / sqrt((1 + 2 <a, a>) (1 + 2 <b, b>))), <a, b> = bias + slope a'b: the covariance of
    erf(u'b + bias) over random u, whose variance is the slope. Such functions saturate, as scores do between the blank
    and the whole. For features (n, d) and (m, d) it has the shape (n, m).
    """
    rows, columns = ((1 + 2 * (_BIAS + slope * points.square().sum(dim=1))).rsqrt() for points in (first, second))
    products = 2 * (_BIAS + slope * (first @ second.T))
    return torch.asin(products * rows[:, None] * columns) * (2 / pi)


def most_informative(draws: Tensor, maps: Tensor, count: int) -> Tensor:
    r"""The indices of the channels whose scores, once known, lower the variance of the final maps most, (count,).

    Over the draws of the scores, (draws, K), and of the final maps, (draws, pixels), knowing s_k lowers the variance of
    the maps by sum over pixels p of cov(s_k, map_p)^2 / var(s_k). The channel that lowers it most is taken, what it
    explains is taken out of all draws, and so on: for fewer channels than there are draws.
    """
    scores = (draws - draws.mean(dim=0)).T
    maps = maps - maps.mean(dim=0)
    covariance = scores @ maps
    variance = scores.square().sum(dim=1)
    gains = covariance.square().sum(dim=1) / variance
    # Those that tell least by themselves are left out.
    candidates = gains.topk(min(_CANDIDATES, len(gains))).indices
    scores, covariance, variance = scores[candidates], covariance[candidates], variance[candidates]
    # The rest of a variance that other channels explain is rounding, and explains nothing.
    least = 1e-4 * variance
    directions = scores.new_empty(count, scores.shape[1])
    chosen: list[Tensor] = []
    for turn in range(count):
        gains = covariance.square().sum(dim=1) / variance.maximum(least)
        if chosen:
            gains[torch.stack(chosen)] = -1
        chosen.append(gains.argmax())
        before = directions[:turn]
        direction = scores[chosen[-1]] - before.T @ (before @ scores[chosen[-1]])
        directions[turn] = direction / direction.norm()
        along = scores @ directions[turn]
        covariance -= torch.outer(along, directions[turn] @ maps)
        variance = variance - along.square()
    return candidates[torch.stack(chosen)]


def relu_minmax(maps: Tensor) -> Tensor:
    """ReLU, then min-max: the final form of maps, (rows, pixels) or (pixels,)."""
    maps = relu(maps)
    lowest, highest = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    span = highest - lowest
    return (maps - lowest) / torch.where(span == 0, 1, span)


def pooled(maps: Tensor) -> Tensor:
    r"""Averages maps of shape (rows, \*s) to at most ``_LONGEST`` pixels along each axis, (rows, pixels)."""
    axes = maps.dim() - 1
    size = tuple(min(length, _LONGEST[axes]) for length in maps.shape[1:])
    averaged: Tensor = interpolate(maps.unsqueeze(1), size, mode="area")
    return averaged.flatten(1)
