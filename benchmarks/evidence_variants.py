"""What Fusion-CAM's lower Average Drop comes from, and variants of its fusion.

For each photograph, Grad-CAM's and Score-CAM's maps (tolerance 0.05) are fused in several ways, of which only the
first is the paper's; the others are ours, and tried here alone. Since a map that covers more keeps more, two controls
have the coverage of another map: Score-CAM's map to the power at which its mean is that of Fusion-CAM's, and the other
way around. Powers change no pixel's rank, so that insertion and deletion stay what they were. A variant is chosen on
the photographs at even places of the sorted folder and judged on those at odd places. One has Finer-CAM's gradients in
Grad-CAM's place, since that had the best insertion of what is cheap.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

from captum_fusion import LayerFinerCam, LayerFusionCam, LayerScoreCam
from captum_fusion._app.images import open_photograph
from captum_fusion._app.models.layer import choose_layer
from captum_fusion._app.models.loading import load_classifier
from captum_fusion.benchmark._dataset import Picture
from captum_fusion.benchmark._sources import find_pictures
from captum_fusion.functional import normalize
from captum_fusion.metrics import complexity, confidence_drop, deletion, insertion, saliency_map

VARIANTS = "variants.jsonl"
PUBLISHED, REGION = "fusion-cam", "score-cam"
# Ours, by how they make one map of the gradient map and the region map.
FUSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "maximum of both": torch.maximum,
    "mean of both": lambda gradient, region: normalize((gradient + region) / 2),
    "product of both": lambda gradient, region: normalize(gradient * region),
}
UNDENOISED = "fusion-cam without denoising"
FINER, WITH_FINER = "finer-cam", "fusion-cam with Finer-CAM's gradients"
WIDER, NARROWER = "score-cam with the coverage of fusion-cam", "fusion-cam with the coverage of score-cam"
NAMES = (PUBLISHED, UNDENOISED, WITH_FINER, REGION, FINER, *FUSIONS, WIDER, NARROWER)
# Steps of insertion and deletion, photographs that are explained together, halvings of the range of the power.
STEPS, _BATCH, _HALVINGS = 10, 13, 40


def as_wide(maps: Tensor, wanted: Tensor) -> Tensor:
    """Maps to the power, each its own, at which their means are those of others, (N, 1, H, W)."""
    low, high = (torch.full((len(maps), 1, 1, 1), value) for value in (-6.0, 6.0))
    for _ in range(_HALVINGS):
        power = (low + high) / 2
        too_wide = (maps ** power.exp()).mean(dim=(1, 2, 3), keepdim=True) > wanted.mean(dim=(1, 2, 3), keepdim=True)
        low, high = torch.where(too_wide, power, low), torch.where(too_wide, high, power)
    return maps ** power.exp()


def read(file: Path) -> dict[str, dict[str, Any]]:
    """What was measured of each photograph, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        measured = json.loads(line)
        found.setdefault(measured.pop("image"), {}).update(measured)
    return found


def missing(images: str, file: Path, limit: int | None) -> list[tuple[Picture, tuple[str, ...]]]:
    """The photographs, of the first so many of a folder, with the maps that were not measured of them."""
    known = read(file)
    pictures = find_pictures(images).pictures[:limit]
    left = [(each, tuple(name for name in NAMES if name not in known.get(each.name, {}))) for each in pictures]
    return sorted(((each, names) for each, names in left if names), key=lambda item: len(item[1]))


def measure(images: str, file: Path, limit: int | None) -> None:
    """Appends a line for each photograph of which something was not measured.

    Args:
        images (str): The folder of photographs.
        file (Path): Where the lines go.
        limit (int or None): How many of the photographs, at most; None for all.
    """
    left = missing(images, file, limit)
    classifier = load_classifier()
    model = classifier.model
    preprocessing = classifier.preprocessing
    compiled = torch.compile(model, options={"freezing": True})
    for start in range(0, len(left), _BATCH):
        chosen = [picture for picture, _ in left[start : start + _BATCH]]
        wanted = {name for _, names in left[start : start + _BATCH] for name in names}
        pixels = torch.cat([preprocessing.crop(open_photograph(picture.file).image) for picture in chosen])
        inputs = preprocessing.normalize(pixels)
        layer = choose_layer(model, inputs, None).layer
        target = classifier.scores(inputs).argmax(dim=1).tolist()
        found = maps(model, compiled, layer, inputs, target)
        lines: list[dict[str, Any]] = [{"image": picture.name} for picture in chosen]
        for name in sorted(wanted):
            each = found[name]
            values = {
                "confidence_drop": confidence_drop(compiled, inputs, each, target=target),
                "complexity": complexity(each),
            }
            if name not in (WIDER, NARROWER):
                areas = [curve(compiled, inputs, each, target=target, steps=STEPS) for curve in (insertion, deletion)]
                values["overall"] = areas[0] - areas[1]
            for measured, numbers in values.items():
                for line, number in zip(lines, numbers.tolist(), strict=True):
                    line.setdefault(name, {})[measured] = number
        with file.open("a") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)


def maps(model: nn.Module, compiled: Any, layer: nn.Module, inputs: Tensor, target: list[int]) -> dict[str, Tensor]:
    """The map of each variant, (N, 1, H, W)."""
    size = tuple(inputs.shape[2:])
    grad_cam, score_cam = LayerGradCam(model, layer), LayerScoreCam(compiled, layer, tolerance=0.05)
    region = saliency_map(score_cam.attribute(inputs, target), size)
    gradient = saliency_map(grad_cam.attribute(inputs, target), size)
    fused = {}
    finer_cam = LayerFinerCam(model, layer)
    for name, method, percentile in (
        (PUBLISHED, grad_cam, 10.0),
        (UNDENOISED, grad_cam, 0.0),
        (WITH_FINER, finer_cam, 10.0),
    ):
        fusion_cam = LayerFusionCam(compiled, layer, gradient_method=method)
        values = fusion_cam.attribute(inputs, target, percentile=percentile, region_attributions=region)
        fused[name] = values[:, :1]
    return (
        fused
        | {REGION: region, FINER: saliency_map(finer_cam.attribute(inputs, target), size)}
        | {name: fuse(gradient, region) for name, fuse in FUSIONS.items()}
        | {WIDER: as_wide(region, fused[PUBLISHED]), NARROWER: as_wide(fused[PUBLISHED], region)}
    )
