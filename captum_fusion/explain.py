"""Explains one picture: what the command draws, as a value."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captum_fusion._checks import Activation, check_activation, check_tolerance
from captum_fusion._layers import FeatureMap
from captum_fusion._methods import RememberedScoreCam, parse_method
from captum_fusion._models import Frame, choose_layer, find_device, give_scores, load_classifier
from captum_fusion._names import reason
from captum_fusion._photograph import Photograph, as_rgb, open_photograph
from captum_fusion.attr.fusion_cam import FusionCamStages, LayerFusionCam
from captum_fusion.metrics import saliency_map

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    r"""Why a model sees a class in a picture, by one or more methods.

    ``maps`` and ``kept`` go by the names of the methods, or of the stages of Fusion-CAM where no method was chosen.
    """

    image: str
    """The picture's file, or what it is."""
    model: str
    """The name of the model."""
    weights: str
    """Where its weights come from: "default", "none" for random ones, or a file."""
    layer: str
    """The dotted name of the layer that is explained."""
    feature_map: FeatureMap
    """The layer, and how its output is a feature map."""
    target: int
    """The class that is explained."""
    categories: tuple[str, ...] | None
    """The names of all classes, where they are known."""
    probabilities: Tensor
    """What the model predicts for each class, shape (K,)."""
    pixels: Tensor
    r"""The picture as the model sees it, (1, 3, \*S) in [0, 1]."""
    frame: Frame
    """Where these pixels lie in the upright picture, in its own pixels: x1, y1, x2, y2."""
    maps: dict[str, Tensor]
    r"""The maps, (1, 1, \*S) in [0, 1]. A map without evidence for the class is all zeros."""
    kept: dict[str, float]
    """The probability of the target that remains when each map masks the picture."""
    stages: dict[str, FusionCamStages]
    """The stages of each fusion, with what each contributes."""
    notes: tuple[str, ...]
    """What a reader of the maps ought to know, such as how the picture's values were brought to 8 bits."""

    @property
    def probability(self) -> float:
        """The probability of the target."""
        return float(self.probabilities[self.target])

    @property
    def category(self) -> str:
        """The name of the target, or its index where there are no names."""
        return self.category_of(self.target)

    def category_of(self, index: int) -> str:
        """The name of a class, or its index where there are no names."""
        return self.categories[index] if self.categories else str(index)

    def top(self, count: int = 5) -> list[tuple[int, str, float]]:
        """The most probable classes: index, name and probability."""
        best = self.probabilities.topk(min(count, len(self.probabilities)))
        return [
            (index, self.category_of(index), value)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def explain(
    image: str | Path | Image.Image | None = None,
    *,
    model: str | nn.Module | None = None,
    weights: str | None = None,
    layer: str | None = None,
    grid: tuple[int, int] | None = None,
    target: int | str | None = None,
    methods: Sequence[str] = (),
    tolerance: float = 0.0,
    size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    activation: Activation = "softmax",
    device: str | None = None,
    show_progress: bool = False,
) -> Explanation:
    r"""Explains one picture: which of its parts speak for a class.

    Args:
        image (str, Path or PIL.Image, optional): The picture. Default: None, which means the photograph of a cup of
            espresso that the demo extra brings
        model (str or Module, optional): A torchvision classifier such as "resnet50", "timm:NAME", "hf:NAME" or
            "hf:FOLDER" for an image classifier of Hugging Face, "package.module:callable" for a callable that returns a
            model, or a model. Default: None, which means the EfficientNet-Lite0 of the demo extra with its ImageNet
            weights
        weights (str, optional): A file with a state dict, or "none" for seeded random weights. Default: None, which
            means the default weights of the model
        layer (str, optional): The dotted name of the layer to explain, which may give tokens or a channels-last map.
            Default: None, which means that of ``last_feature_map``
        grid (tuple[int, int], optional): The rows and columns of the layer's tokens, where they do not follow from the
            input. Default: None
        target (int or str, optional): The class to explain: an index, a category name or an ImageNet WordNet id.
            Default: None, which means the predicted class
        methods (list[str], optional): Names of methods, such as "grad-cam", "fusion-cam:raw" or
            "fusion(x-grad-cam,group-cam)". Default: the stages of Fusion-CAM
        tolerance (float, optional): How far Score-CAM, alone or fused, may be from the exact map, in [0, 1), see
            ``LayerScoreCam``. Default: 0.0, which is exact
        size (int, optional): Input size in pixels. Default: that of the model's weights, else 224
        mean (tuple[float, float, float], optional): Mean of each channel. Default: that of the model's weights, else
            ImageNet's
        std (tuple[float, float, float], optional): Standard deviation of each channel. Default: likewise
        activation (str, optional): What makes probabilities of the scores: "softmax", or "sigmoid" for a binary or
            multi-label classifier. Default: "softmax"
        device (str, optional): Where to compute; not for a model that is given, which stays where it is.
            Default: cuda if there is one, else cpu
        show_progress (bool, optional): Whether to show progress. Default: False

    Returns:
        *Explanation* with the maps at the input's resolution, on the CPU. A model that is given stays as it was.

    Raises:
        ValueError: If an argument names nothing, or if the picture cannot be read.
        TypeError: If the model does not return a tensor.
        RuntimeError: If the model's scores are not finite.
        OSError: If there is no such picture, or if weights cannot be read.

    Examples::

        >>> from torchvision.models import resnet18
        >>> explanation = explain(
        ...     Image.new("RGB", (80, 60), "teal"), model=resnet18(weights=None), methods=["grad-cam"], size=64
        ... )
        >>> explanation.layer, explanation.maps["grad-cam"].shape
        ('layer4', torch.Size([1, 1, 64, 64]))
    """
    check_tolerance(tolerance)
    chosen = [parse_method(method) for method in methods]
    name, photograph = _open(image)
    check_activation(activation)
    classifier = load_classifier(model, weights, size, mean, std, activation)
    network = classifier.model
    if isinstance(model, nn.Module):
        if device is not None:
            raise ValueError(f"device is {device!r} for a model that is given itself; expected the model's own")
        place = next(iter(network.parameters()), torch.empty(0)).device
    else:
        place = find_device(device)
        network.to(place)
    try:
        pixels = classifier.preprocessing.crop(photograph.image)
    except ValueError as error:
        raise ValueError(f"{name} cannot be explained: {error}") from error
    inputs = classifier.preprocessing.normalize(pixels).to(place)
    with _evaluating(network):
        # Two rows, so that a model that returns one row for any batch is found.
        scores = classifier.scores(torch.cat([inputs, inputs]))[:1]
        feature_map = choose_layer(network, inputs, layer, grid)
        probabilities = classifier.probabilities(scores)[0].cpu()
        index = int(probabilities.argmax()) if target is None else classifier.target(str(target), len(probabilities))
        maps: dict[str, Tensor] = {}
        stages: dict[str, FusionCamStages] = {}
        with feature_map.view() as module:
            score_cam = RememberedScoreCam(network, module, tolerance)
            for method in chosen or [parse_method("fusion-cam")]:
                attribution = method.build(network, module, score_cam, activation)
                options: dict[str, Any] = {}
                if isinstance(attribution, LayerFusionCam):
                    options = {"weighting": method.weighting, "return_stages": True, "show_progress": show_progress}
                try:
                    result: Any = attribution.attribute(inputs, target=index, **options)
                except Exception as error:
                    raise RuntimeError(f"{method.name} fails: {reason(error)}") from error
                if isinstance(attribution, LayerFusionCam):
                    result, stages[method.name] = result
                maps[method.name] = saliency_map(result, tuple(inputs.shape[2:]))
        if not chosen:
            maps = _stage_maps(stages["fusion-cam"])
        kept = {}
        for label, values in maps.items():
            masked = classifier.scores(inputs * values.to(inputs.dtype))
            kept[label] = float(classifier.probabilities(masked)[0, index])
    notes = [f"{name}: {photograph.note}"] if photograph.note else []
    notes += [
        f"The map of {label} is empty: by it nothing speaks for the class" for label in maps if not maps[label].any()
    ]
    return Explanation(
        image=name,
        model=classifier.name,
        weights=weights or "default",
        layer=feature_map.name,
        feature_map=feature_map,
        target=index,
        categories=classifier.categories,
        probabilities=probabilities,
        pixels=pixels,
        frame=classifier.preprocessing.frame(*photograph.image.size),
        maps={label: values.cpu() for label, values in maps.items()},
        kept=kept,
        stages=stages,
        notes=tuple(notes),
    )


def _open(image: str | Path | Image.Image | None) -> tuple[str, Photograph]:
    """The name of a picture and the picture."""
    if isinstance(image, Image.Image):
        return "The picture", as_rgb(image)
    if image is not None:
        return str(image), open_photograph(Path(image))
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The sample photograph needs the package {error.name}: pip install 'captum-fusion[demo]', "
            "or give a picture"
        ) from error
    return "skimage.data.coffee", Photograph(Image.fromarray(data.coffee()))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, giving its scores alone, and as it was afterwards."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    scores = give_scores(network)
    try:
        yield
    finally:
        scores.remove()
        for module in training:
            module.training = True


def _stage_maps(stages: FusionCamStages) -> dict[str, Tensor]:
    return {
        "Grad-CAM": stages.gradient,
        "Denoised Grad-CAM": stages.denoised,
        "Score-CAM": stages.region,
        "Combined": stages.combined,
        "Fusion-CAM": stages.fused,
    }
