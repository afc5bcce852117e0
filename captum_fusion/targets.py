"""Forward functions for other targets than a class of an image: a region of a segmentation, a box of a detector.

Each function wraps a model. Pass it as ``forward_func``, and a layer of the model as ``layer``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import box_iou

from captum_fusion._engine.guards import corners, undetected_examples
from captum_fusion._engine.outputs import scores_in

__all__ = ["box_score", "region_scores", "scores_in"]

_mirrored: ContextVar[bool] = ContextVar("_mirrored", default=False)
_in_windows: ContextVar[bool] = ContextVar("_in_windows", default=False)


@contextmanager
def _set(variable: ContextVar[bool], value: bool = True) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def mirrored() -> AbstractContextManager[None]:
    """Mirrors regions and boxes along the last axis inside the ``with``, where the input is mirrored."""
    return _set(_mirrored)


def in_windows(cut: bool) -> AbstractContextManager[None]:
    """Refuses regions and boxes inside the ``with``, if windows are cut out of the input."""
    return _set(_in_windows, cut)


def _check_whole(place: str) -> None:
    if _in_windows.get():
        raise ValueError(
            f"The {place} is a place in the whole input, and forward_func runs on windows of it; expected a score of "
            "any window, such as that of a class, or scales=[1.0]"
        )


def region_scores(forward_func: Callable[..., Any], region: Tensor) -> Callable[..., Tensor]:
    r"""Computes the mean score of each class over a region, for a segmentation model.

    The mean stays in the range of the model's scores. A sum over thousands of pixels would saturate the softmax, and
    the class probability would be 1 for every mask.

    Args:
        forward_func (Callable): A model that returns the scores of each pixel, (N, K, \*S), alone or in a dictionary or
            ``ModelOutput`` as ``out`` or ``logits``.
        region (Tensor or numpy.ndarray): The pixels that count, of shape S, as a boolean mask or as weights. If the
            model's scores have another size, they are interpolated to this one.

    Returns:
        *Callable* that returns scores of shape (N, K); its ``target`` is a class.

    Raises:
        ValueError: If the region is empty or holds negative weights, or, when the model runs, if the axes of the scores
            do not fit the region.

    Examples::

        >>> from torchvision.models.segmentation import lraspp_mobilenet_v3_large
        >>> model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
        >>> image = torch.rand(1, 3, 64, 64)
        >>> cat = model(image)["out"][0].argmax(dim=0) == 8
        >>> cat[:32] = True  # Random weights know no cats.
        >>> region_scores(model, cat)(image).shape
        torch.Size([1, 21])
    """
    region = torch.as_tensor(region)
    weights = region.float()
    if not weights.sum() > 0 or weights.min() < 0:
        raise ValueError("The region is empty or holds negative weights; expected at least one pixel above 0")

    def forward(*args: Any) -> Tensor:
        _check_whole("region")
        scores = scores_in(forward_func(*args))
        if not isinstance(scores, Tensor) or scores.dim() != region.dim() + 2:
            returned = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"forward_func returned {returned} for a region of shape {tuple(region.shape)}; expected scores of "
                "each pixel, (N, K, *S), and a region of shape S, such as region[0] without the axis of a batch or a "
                "channel"
            )
        if scores.shape[2:] != region.shape:
            mode = ("linear", "bilinear", "trilinear")[region.dim() - 1]
            scores = interpolate(scores, size=tuple(region.shape), mode=mode, align_corners=False)
        shares = ((weights.flip(-1) if _mirrored.get() else weights) / weights.sum()).to(scores)
        return (scores * shares).flatten(2).sum(dim=2)

    return forward


def box_score(forward_func: Callable[..., Any], box: Sequence[float] | Tensor, label: int) -> Callable[..., Tensor]:
    """Scores a box by the largest product of a detection's score and its overlap with the box.

    The overlap is the intersection over union. The product is the similarity of D-RISE
    (https://arxiv.org/abs/2006.03204) for one class.

    Args:
        forward_func (Callable): A detector that returns a dictionary of "boxes" (D, 4), "labels" (D,) and "scores" (D,)
            for each example, as torchvision's detectors do.
        box (Sequence[float] or Tensor): The box to explain: x1, y1, x2, y2, or
            ``torchvision.tv_tensors.BoundingBoxes`` of any format with one box.
        label (int): The label of the box.

    Returns:
        *Callable* that returns scores of shape (N,) in [0, 1]. If the label is not detected, the score is 0 and the map
        is zero, with a warning. Explain the box with ``target=None``, and with ``activation=None`` if the method has an
        activation.

    Raises:
        ValueError: If the box has no area, or, when the model runs, if it is in [0, 1] and the detector's boxes are in
            pixels.
        TypeError: When the model runs, if it does not return detections.

    Examples::

        >>> def detector(images):
        ...     boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0]])
        ...     found = {"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.5, 0.8])}
        ...     return [found for _ in images]
        >>> box_score(detector, [0, 0, 4, 4], label=1)(torch.rand(2, 3, 8, 8))
        tensor([0.5000, 0.5000])
    """
    wanted = (corners(box) if isinstance(box, Tensor) else torch.as_tensor(box)).float().reshape(1, -1)
    if wanted.shape[1] != 4 or not (wanted[:, 2:] > wanted[:, :2]).all():
        raise ValueError(f"box is {wanted[0].tolist()}; expected x1 < x2 and y1 < y2 as x1, y1, x2, y2")

    # Of a box inside one pixel, or in shares of the image's sides.
    in_shares = bool((wanted <= 1).all() and (wanted % 1).any())

    def score(detection: Any, inputs: Tensor) -> Tensor:
        chosen = detection["labels"] == label
        scores = detection["scores"][chosen]
        if not len(scores):
            # The sum of nothing is 0 with the graph of the detections, so that its gradients are 0.
            none: Tensor = scores.sum().to(inputs)
            return none
        box = wanted
        if _mirrored.get():
            x1, y1, x2, y2 = wanted[0]
            width = 1 if in_shares else inputs.shape[-1]
            box = torch.stack([width - x2, y1, width - x1, y2])[None]
        # Boxes of a detector that gives shares may reach a little over the border.
        if in_shares and detection["boxes"].max() > 2:
            raise ValueError(
                f"box is {wanted[0].tolist()}, in shares of the image's sides, and the detector's boxes are in pixels; "
                "expected pixels: multiply by the width and the height"
            )
        overlap = box_iou(detection["boxes"][chosen], box.to(detection["boxes"]))[:, 0]
        best: Tensor = (scores * overlap).max()
        return best

    def forward(inputs: Tensor, *args: Any) -> Tensor:
        _check_whole("box")
        detections = forward_func(inputs, *args)
        if not isinstance(detections, (list, tuple)) or not all(
            isinstance(each, Mapping) and "boxes" in each for each in detections
        ):
            raise TypeError(
                f"forward_func returned {type(detections).__name__}; expected a list with a dictionary of boxes, "
                "labels and scores for each example. A detector in training mode returns losses: call model.eval()."
            )
        empty = undetected_examples.get()
        if empty is not None:
            empty.update(i for i, each in enumerate(detections) if not (each["labels"] == label).any())
        return torch.stack([score(each, inputs) for each in detections])

    return forward
