"""The equations once more: NumPy in float64, one example, one channel, one pixel axis at a time."""

from collections.abc import Callable
from math import floor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Score = Callable[[Tensor], float]


def normalize(values: Array) -> Array:
    span = values.max() - values.min()
    constant = span <= 100 * np.finfo(values.dtype).eps * np.abs(values).max()
    return np.zeros_like(values) if constant else (values - values.min()) / span


def upsample(values: Array, size: tuple[int, ...]) -> Array:
    """Linear interpolation along each axis in turn, between pixel centres."""
    if (values == values.flat[0]).all():
        return np.full(size, values.flat[0])
    for axis, length in enumerate(size):
        source = values.shape[axis]
        lines = []
        for index in range(length):
            position = min(max((index + 0.5) * source / length - 0.5, 0), source - 1)
            left = floor(position)
            right = min(left + 1, source - 1)
            share = position - left
            lines.append((1 - share) * values.take(left, axis) + share * values.take(right, axis))
        values = np.stack(lines, axis)
    return values


@torch.no_grad()
def masked_score(score: Score, x: Tensor, mask: Array, baseline: Tensor) -> float:
    m = torch.from_numpy(mask).to(x)
    return score(m * x + (1 - m) * baseline)


def logit(model: nn.Module, target: int) -> Score:
    return lambda x: model(x)[0, target].item()


def probability(model: nn.Module, target: int) -> Score:
    return lambda x: model(x).softmax(1)[0, target].item()


def rounding(masked: float, blank: float, scale: float) -> float:
    """The largest difference that rounding makes between equal probabilities; it grows with the largest logit."""
    eps = float(np.finfo(np.float64).eps)
    return min(eps * max(100, 10 * scale), eps**0.5) * max(abs(masked), abs(blank))


def contribution(masked: float, blank: float, scale: float = 1.0) -> float:
    return masked - blank if abs(masked - blank) > rounding(masked, blank, scale) else 0.0


def is_sure(masked: float, blank: float, scale: float = 1.0) -> bool:
    """Whether rounding neither decides that the contribution is 0 nor is a part of it."""
    ratio = abs(masked - blank) / (rounding(masked, blank, scale) or 1.0)
    return ratio < 0.5 or ratio > 1e4


def activations_and_gradients(
    model: nn.Module, layer: nn.Module, x: Tensor, target: int, others: list[float] | None = None
) -> tuple[Array, Array]:
    """The layer's value and gradients of the target's score, or of the weighted sum of all scores."""
    kept = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()  # The next layer may work in place.

    hook = layer.register_forward_hook(keep)
    scores = model(x.clone().requires_grad_())[0]
    logit = scores[target] if others is None else sum(w * s for w, s in zip(others, scores, strict=True))
    hook.remove()
    (gradient,) = torch.autograd.grad(logit, kept[-1])
    return kept[-1][0].detach().double().numpy(), gradient[0].double().numpy()


def grad_cam(activations: Array, gradients: Array) -> Array:
    total = np.zeros(activations.shape[1:])
    for channel, gradient in zip(activations, gradients, strict=True):
        total += gradient.mean() * channel
    return total


def score_cam(activations: Array, score: Score, x: Tensor, baseline: Tensor) -> Array:
    size = tuple(x.shape[2:])
    scores = [masked_score(score, x, normalize(upsample(channel, size)), baseline) for channel in activations]
    return by_softmax(activations, scores)


def by_softmax(activations: Array, scores: list[float]) -> Array:
    exponentials = [np.exp(value - max(scores)) for value in scores]
    total = np.zeros(activations.shape[1:])
    for channel, exponential in zip(activations, exponentials, strict=True):
        total += exponential / sum(exponentials) * channel
    return total


def is_cam(activations: Array, score: Score, x: Tensor, baseline: Tensor, samples: int) -> Array:
    scores = []
    for channel in activations:
        mask = normalize(upsample(channel, tuple(x.shape[2:])))
        steps = [masked_score(score, x, step / samples * mask, baseline) for step in range(1, samples + 1)]
        scores.append(sum(steps) / samples)
    return by_softmax(activations, scores)


def ss_cam(activations: Array, score: Score, x: Tensor, baseline: Tensor, noises: list[Array]) -> Array:
    scores = []
    for channel in activations:
        mask = normalize(upsample(channel, tuple(x.shape[2:])))
        noisy = [masked_score(score, x, mask + noise, baseline) for noise in noises]
        scores.append(sum(noisy) / len(noisy))
    return by_softmax(activations, scores)


def ablation_cam(model: nn.Module, layer: nn.Module, x: Tensor, target: int, activations: Array) -> Array:
    """By a layer whose channel is gone."""
    whole = logit(model, target)(x)
    total = np.zeros(activations.shape[1:])
    for k, channel in enumerate(activations):

        def without(_: nn.Module, __: object, output: Tensor, k: int = k) -> Tensor:
            kept = torch.ones(output.shape[1]).to(output)
            kept[k] = 0
            return output * kept.reshape(-1, *(1,) * (output.dim() - 2))

        hook = layer.register_forward_hook(without)
        lost = whole - logit(model, target)(x)
        hook.remove()
        total += lost / (abs(whole) or 1) * channel
    return total


def enlarge_and_crop(grid: Array, shift: Array, size: tuple[int, ...]) -> Array:
    cells = [-(-length // count) for length, count in zip(size, grid.shape, strict=True)]
    enlarged = upsample(grid, tuple((count + 1) * cell for count, cell in zip(grid.shape, cells, strict=True)))
    starts = [floor(share * cell) for share, cell in zip(shift, cells, strict=True)]
    return enlarged[tuple(slice(start, start + length) for start, length in zip(starts, size, strict=True))]


def rise(masks: list[Array], probability: float, score: Score, x: Tensor, baseline: Tensor) -> Array:
    total = np.zeros(tuple(x.shape[2:]))
    for mask in masks:
        total += masked_score(score, x, mask, baseline) * mask
    return total / (probability * len(masks))


def grad_cam_plus_plus(activations: Array, gradients: Array) -> Array:
    """With alpha as the paper writes it, second and third derivatives of the exponential of the score."""
    total = np.zeros(activations.shape[1:])
    for channel, gradient in zip(activations, gradients, strict=True):
        weight = 0.0
        for pixel in np.ndindex(channel.shape):
            divisor = 2 * gradient[pixel] ** 2 + channel.sum() * gradient[pixel] ** 3
            if divisor != 0:
                weight += gradient[pixel] ** 2 / divisor * max(gradient[pixel], 0)
        total += weight * channel
    return total


def x_grad_cam(activations: Array, gradients: Array) -> Array:
    total = np.zeros(activations.shape[1:])
    for channel, gradient in zip(activations, gradients, strict=True):
        if channel.sum() != 0:
            total += (gradient * channel).sum() / channel.sum() * channel
    return total


def shapley_cam(model: nn.Module, layer: nn.Module, x: Tensor, target: int, utility: str) -> Array:
    """With the Hessian's product from gradients at activations a little larger and a little smaller."""

    def at(scale: float) -> tuple[Array, Array]:
        kept = []

        def enlarge(_: nn.Module, __: object, output: Tensor) -> Tensor:
            kept.append((scale * output).detach().requires_grad_())
            return kept[0].clone()

        hook = layer.register_forward_hook(enlarge)
        scores = model(x)[0]
        hook.remove()
        residual = (scores - scores[target]).exp().sum().log() if utility == "rest" else 0
        (gradient,) = torch.autograd.grad(scores[target] - residual, kept[0])
        return kept[0][0].detach().numpy(), gradient[0].numpy()

    activations, gradients = at(1.0)
    products = (at(1 + 1e-5)[1] - at(1 - 1e-5)[1]) / 2e-5
    total = np.zeros(activations.shape[1:])
    for channel, gradient, product in zip(activations, gradients, products, strict=True):
        total += (gradient - product / 2).mean() * channel
    return total


def full_grad(model: nn.Module, x: Tensor, target: int) -> tuple[Array, float]:
    """The map, and the sum of its terms, from zeros that are added to the input and to what biases add."""
    added: list[tuple[Tensor, Tensor]] = []

    def add(module: nn.Module, _: object, output: Tensor) -> Tensor:
        bias = module.bias
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # What the module makes of zeros.
            empty = torch.zeros(1, module.num_features, *(1,) * (output.dim() - 2)).to(output)
            bias = type(module).forward(module, empty).flatten()
        zeros = torch.zeros_like(output, requires_grad=True)
        added.append((bias.detach(), zeros))
        return output + zeros

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm)
    parts = [part for part in model.modules() if isinstance(part, kinds) and part.bias is not None]
    hooks = [part.register_forward_hook(add) for part in parts]
    offset = torch.zeros_like(x, requires_grad=True)
    gradients = torch.autograd.grad(model(x + offset)[0, target], [offset, *(zeros for _, zeros in added)])
    for hook in hooks:
        hook.remove()
    size = tuple(x.shape[2:])
    total, terms = np.zeros(size), 0.0
    values = [x[0], *(bias.reshape(-1, *(1,) * len(size)) for bias, _ in added)]
    for value, gradient in zip(values, gradients, strict=True):
        for channel in (value * gradient[0]).double().numpy():
            total += upsample(normalize(np.abs(channel)), size)
            terms += channel.sum()
    return total, terms


def le_grad(block: Any, head: Callable[[Tensor], Tensor], tokens: Tensor, target: int) -> tuple[Array, Tensor]:
    """The map of a block of torchvision over all tokens, and what the block returns."""
    attention = block.self_attention
    projected = nn.functional.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
    queries, keys, values = projected[0].chunk(3, dim=1)
    size = queries.shape[1] // attention.num_heads
    probabilities, heads = [], []
    for start in range(0, queries.shape[1], size):
        part = slice(start, start + size)
        scores = (queries[:, part] @ keys[:, part].T / size**0.5).softmax(dim=1)
        probabilities.append(scores.detach().requires_grad_())
        heads.append(probabilities[-1] @ values[:, part])
    attended = tokens + attention.out_proj(torch.cat(heads, dim=1))[None]
    after = attended + block.mlp(block.ln_2(attended))
    gradients = torch.autograd.grad(head(after)[0, target], probabilities)
    total = np.zeros(len(queries))
    for gradient in gradients:
        for query in gradient.double().numpy():
            total += np.maximum(query, 0)
    return total / len(gradients) / len(queries), after.detach()


def winsor_cam(model: nn.Module, layers: list[nn.Module], x: Tensor, target: int, percentile: float) -> Array:
    maps, importances = [], []
    for layer in layers:
        activations, gradients = activations_and_gradients(model, layer, x, target)
        maps.append(upsample(normalize(np.maximum(grad_cam(activations, gradients), 0)), tuple(x.shape[2:])))
        importances.append(np.mean([gradient.mean() for gradient in gradients]))
    positive = [importance for importance in importances if importance > 0]
    total = np.zeros(tuple(x.shape[2:]))
    if not positive:
        return total
    highest, lowest = np.percentile(positive, percentile), min(positive)
    for map_, importance in zip(maps, importances, strict=True):
        if importance > 0:
            weight = 1.0 if highest == lowest else 0.1 + 0.9 * (min(importance, highest) - lowest) / (highest - lowest)
            total += weight * map_
    return total


def sess(
    model: nn.Module, layer: nn.Module, x: Tensor, target: int, sizes: list[tuple[int, int]], left_out: int
) -> Array:
    """Of Grad-CAM, before the blur; windows have the input's size, and those of the lowest scores are left out."""
    height, width = x.shape[2:]
    windows = []
    for size in sizes:
        large = torch.from_numpy(np.stack([upsample(channel, size) for channel in x[0].double().numpy()])).to(x)[None]
        for top in sorted({min(start, size[0] - height) for start in range(0, size[0], height)}):
            for left in sorted({min(start, size[1] - width) for start in range(0, size[1], width)}):
                crop = large[..., top : top + height, left : left + width]
                grad_cam_map = component(
                    grad_cam(*activations_and_gradients(model, layer, crop, target)), (height, width)
                )
                canvas = np.zeros(size)
                canvas[top : top + height, left : left + width] = grad_cam_map
                windows.append((probability(model, target)(crop), upsample(canvas, (height, width))))
    best = max(score for score, _ in windows)
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for score, map_ in sorted(windows, key=lambda window: window[0])[left_out:]:
        total += score / best * map_
        count += map_ > 0
    return total / np.maximum(count, 1)


def layer_cam(activations: Array, gradients: Array) -> Array:
    total = np.zeros(activations.shape[1:])
    for channel, gradient in zip(activations, gradients, strict=True):
        for pixel in np.ndindex(channel.shape):
            total[pixel] += max(gradient[pixel], 0) * channel[pixel]
    return total


def hi_res_cam(activations: Array, gradients: Array) -> Array:
    total = np.zeros(activations.shape[1:])
    for channel, gradient in zip(activations, gradients, strict=True):
        for pixel in np.ndindex(channel.shape):
            total[pixel] += gradient[pixel] * channel[pixel]
    return total


def grad_cam_element_wise(activations: Array, gradients: Array) -> Array:
    total = np.zeros(activations.shape[1:])
    for channel, gradient in zip(activations, gradients, strict=True):
        for pixel in np.ndindex(channel.shape):
            total[pixel] += max(gradient[pixel] * channel[pixel], 0)
    return total


def principal_axes(channels: Array) -> tuple[Array, Array, Array]:
    """The centred pixels, and the eigenvalues and eigenvectors of the channels' covariance."""
    points = channels.reshape(len(channels), -1)
    points = points - points.mean(1, keepdims=True)
    scale = np.abs(points).max() or 1.0
    return points, *np.linalg.eigh((points / scale) @ (points / scale).T)


def has_a_principal_component(channels: Array) -> bool:
    """Whether one direction varies more than all others, and whether its sign is sure; or nothing varies."""
    points, variances, vectors = principal_axes(channels)
    clear = len(variances) == 1 or variances[-1] - variances[-2] > 1e-6 * variances[-1]
    still = np.abs(points).max() <= 1e-12 * np.abs(channels).max()
    return bool(still or (clear and abs(vectors[:, -1].sum()) > 1e-6))


def eigen_cam(activations: Array, _: Array) -> Array:
    points, _, vectors = principal_axes(activations)
    component = vectors[:, -1] @ points
    sign = -1 if component @ points.sum(0) < 0 else 1
    return sign * component.reshape(activations.shape[1:])


def eigen_grad_cam(activations: Array, gradients: Array) -> Array:
    return eigen_cam(activations * gradients, gradients)


def seg_eigen_cam(activations: Array, gradients: Array) -> Array:
    component = eigen_cam(np.abs(gradients) * activations, gradients)
    return component * (-1 if abs(component.min()) > component.max() else 1)


def fem(activations: Array, _: Array) -> Array:
    total = np.zeros(activations.shape[1:])
    for channel in activations:
        for pixel in np.ndindex(channel.shape):
            if channel[pixel] > channel.mean() + 2 * channel.std() + 1e-12:
                total[pixel] += channel.mean()
    return total


def kpca_cam(activations: Array, _: Array) -> Array:
    points = activations.reshape(len(activations), -1).T
    points = points - points.mean(0)
    kernel = np.array([[np.tanh(p @ q / len(activations) + 1) for q in points] for p in points])
    centring = np.eye(len(points)) - 1 / len(points)
    sizes, vectors = np.linalg.eigh(centring @ kernel @ centring)
    component = np.sqrt(sizes[-1]) * vectors[:, -1]
    sign = -1 if component @ points.sum(1) < 0 else 1
    return sign * component.reshape(activations.shape[1:])


def blur(x: Tensor, kernel_size: int, sigma: float) -> Tensor:
    offsets = np.arange(kernel_size) - kernel_size // 2
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    values = x.double().numpy()
    for axis in range(2, values.ndim):
        widths = [(0, 0)] * values.ndim
        widths[axis] = (kernel_size // 2, kernel_size // 2)
        padded = np.pad(values, widths, mode="reflect")
        values = np.apply_along_axis(lambda line: np.convolve(line, kernel, mode="valid"), axis, padded)
    return torch.from_numpy(values).to(x)


def group_cam(
    activations: Array, gradients: Array, groups: int, probability: Score, x: Tensor, baseline: Tensor
) -> Array:
    size = tuple(x.shape[2:])
    without = probability(baseline)
    total = np.zeros(size)
    for part in np.array_split(np.arange(len(activations)), groups):
        group = np.zeros(activations.shape[1:])
        for channel in part:
            group += gradients[channel].mean() * activations[channel]
        mask = normalize(upsample(np.maximum(group, 0), size))
        score = max(masked_score(probability, x, mask, baseline) - without, 0)
        total += (score if score > 1e-12 else 0) * mask
    return np.maximum(total, 0)


def union_cam(
    activations: Array,
    gradients: Array,
    region: Array,
    probability: Score,
    x: Tensor,
    baseline: Tensor,
    percentile: float,
    scale: float = 1.0,
) -> tuple[Array, bool]:
    """The map, and whether rounding could make another one of it."""
    size = tuple(x.shape[2:])
    total = np.zeros(activations.shape[1:])
    tied = False
    for channel, gradient in zip(activations, gradients, strict=True):
        threshold = np.percentile(gradient, percentile)
        # Gradients that tie but for rounding may fall on either side of their percentile.
        near = gradient[np.abs(gradient - threshold) <= 1e-9 * np.abs(gradient).max()]
        tied = tied or bool(threshold > 0 and near.size and np.ptp(near) > 0)
        kept = np.where((gradient >= threshold) & (gradient > 0), gradient, 0)
        if kept.any():
            total += kept / kept.sum() * channel
    denoised = normalize(upsample(total, size))
    blank = probability(baseline)
    with_denoised, with_region = (masked_score(probability, x, mask, baseline) for mask in (denoised, region))
    w_d, w_r = weights(contribution(with_denoised, blank, scale), contribution(with_region, blank, scale), "raw")
    union = w_d * denoised + w_r * region
    combined = normalize(union)
    with_combined = masked_score(probability, x, combined, baseline)
    sure = is_sure(with_denoised, blank, scale) and is_sure(with_region, blank, scale)
    sure = sure and is_sure(with_combined, with_region, scale) and not tied
    # Where D = 1 - R, as on layers of two pixels, the union is constant but for rounding, which is then scaled up.
    sure = sure and (not union.any() or np.ptp(union) > 1e-4 * union.max())
    return (combined if contribution(with_combined, with_region, scale) > 0 else region), not sure


def component(layer_map: Array, size: tuple[int, ...]) -> Array:
    return as_mask(upsample(np.maximum(layer_map, 0), size))


def region_component(layer_map: Array, size: tuple[int, ...]) -> Array:
    return as_mask(np.maximum(upsample(layer_map, size), 0))


def as_mask(evidence: Array) -> Array:
    scaled = normalize(evidence)
    # What is positive everywhere and the same keeps everything.
    return np.ones_like(scaled) if not scaled.any() and evidence.min() > 0 else scaled


def denoise(gradient: Array, percentile: float) -> Array:
    values = sorted(gradient.flat)
    rank = percentile / 100 * (len(values) - 1)
    low, high = values[floor(rank)], values[min(floor(rank) + 1, len(values) - 1)]
    threshold = low + (rank - floor(rank)) * (high - low)
    return normalize(np.where(gradient >= threshold, gradient, 0))


def weights(a: float, b: float, weighting: str) -> tuple[float, float]:
    if weighting == "released" and (a or b):
        # As that script has it, which clips nothing.
        return a / (a + b + 1e-8), b / (a + b + 1e-8)
    a, b = max(a, 0.0), max(b, 0.0)
    if weighting == "raw":
        return (a, b) if a + b > 0 else (1.0, 1.0)
    return (a / (a + b), b / (a + b)) if a + b > 0 else (0.5, 0.5)


def fusion_cam(
    gradient: Array,
    region: Array,
    probability: Score,
    x: Tensor,
    baseline: Tensor,
    percentile: float,
    weighting: str,
    scale: float = 1.0,
) -> dict[str, Array | float]:
    """All stages from the component maps G and R, and whether rounding could make others of them."""
    blank = probability(baseline.expand_as(x))
    unsure = False

    def measure(mask: Array) -> float:
        nonlocal unsure
        masked = masked_score(probability, x, mask, baseline)
        unsure = unsure or not is_sure(masked, blank, scale)
        return contribution(masked, blank, scale)

    denoised = denoise(gradient, percentile)
    c_d, c_r = measure(denoised), measure(region)
    w_d, w_r = weights(c_d, c_r, weighting)
    combined = normalize(w_d * denoised + w_r * region)
    c_c = measure(combined)
    w_c, w_r = weights(c_c, w_r if weighting == "released" else c_r, weighting)
    a, b = w_c * combined, w_r * region
    fused = np.empty_like(a)
    for pixel in np.ndindex(a.shape):
        similarity = min(max(1 - abs(a[pixel] - b[pixel]), 0), 1)
        fused[pixel] = similarity * max(a[pixel], b[pixel]) + (1 - similarity) * (a[pixel] + b[pixel]) / 2
    return {
        "gradient": gradient,
        "denoised": denoised,
        "region": region,
        "combined": combined,
        "fused": normalize(fused),
        "gradient_contribution": c_d,
        "region_contribution": c_r,
        "combined_contribution": c_c,
        "unsure": unsure,
    }


def impute(values: Array, kept: NDArray[np.bool_]) -> Array:
    """Each removed pixel's equation, one after the other, and a dense solver."""
    pixels = list(np.ndindex(values.shape))
    places = {pixel: place for place, pixel in enumerate(pixels)}
    matrix, right = np.eye(len(pixels)), np.zeros(len(pixels))
    for pixel in pixels:
        if kept[pixel]:
            right[places[pixel]] = values[pixel]
            continue
        shares = {}
        for offset in np.ndindex(*(3,) * values.ndim):
            steps = [part - 1 for part in offset]
            near = tuple(int(index + step) for index, step in zip(pixel, steps, strict=True))
            if any(steps) and near in places:
                shares[near] = 0.5 ** sum(map(abs, steps))
        for near, share in shares.items():
            matrix[places[pixel], places[near]] = -share / sum(shares.values())
    return np.linalg.solve(matrix, right).reshape(values.shape)
