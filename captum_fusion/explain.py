"""Explains pictures: what the command draws and the page shows, as values."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captum.attr import Attribution
from PIL import Image
from torch import Tensor, nn

from captum_fusion._app.explanation import Curve, Curves, Explanation, Prediction
from captum_fusion._app.images import Photograph, PictureError, as_rgb, open_photograph
from captum_fusion._app.methods import KnownAttribution, Method, parse_method
from captum_fusion._app.models.loading import choose_layer, find_device, give_scores, load_classifier
from captum_fusion._app.names import reason
from captum_fusion._app.sample import sample_photograph
from captum_fusion._engine.guards import check_activation, check_percentile, check_tolerance, check_weighting
from captum_fusion._engine.progress import Progress, tell
from captum_fusion.arguments import Activation, Weighting
from captum_fusion.attr.fusion_cam import FusionCamStages
from captum_fusion.metrics import deletion, insertion, saliency_map

__all__ = ["Curve", "Curves", "Explainer", "Explanation", "OpenedPicture", "Prediction", "explain"]

# Whoever waits for another thread's explanation is asked that often whether to go on.
_PATIENCE_SECONDS = 0.2
# A picture remembers what was made of it by so many methods, percentiles and weightings.
_REMEMBERED = 64


class Explainer:
    """A classifier that is loaded once to explain many pictures; threads that share it take turns.

    Args:
        model (str or Module, optional): As for ``explain``, and so are the others
        weights (str, optional): Default: None
        layer (str, optional): Default: None
        grid (tuple[int, int], optional): Default: None
        size (int, optional): Default: None
        mean (tuple[float, float, float], optional): Default: None
        std (tuple[float, float, float], optional): Default: None
        activation (str, optional): Default: "softmax"
        device (str, optional): Default: None

    Raises:
        ValueError: If an argument names nothing.
        TypeError: If the model is none.
        OSError: If weights cannot be read.

    Examples::

        >>> from torchvision.models import resnet18
        >>> explainer = Explainer(resnet18(weights=None), size=64)
        >>> picture = explainer.open(Image.new("RGB", (80, 60), "teal"))
        >>> for index, name, probability in picture.prediction.top(2):
        ...     explanation = picture.explain(index, ["grad-cam"])
        ...     explanation.maps["grad-cam"].shape
        torch.Size([1, 1, 64, 64])
        torch.Size([1, 1, 64, 64])
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        *,
        weights: str | None = None,
        layer: str | None = None,
        grid: tuple[int, int] | None = None,
        size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        activation: Activation = "softmax",
        device: str | None = None,
    ) -> None:
        check_activation(activation)
        self.classifier = load_classifier(model, weights, size, mean, std, activation)
        network = self.classifier.model
        if isinstance(model, nn.Module):
            if device is not None:
                raise ValueError(f"device is {device!r} for a model that is given itself; expected the model's own")
            self.place = next(iter(network.parameters()), torch.empty(0)).device
        else:
            self.place = find_device(device)
            network.to(self.place)
        self.weights = weights or "default"
        self._layer, self._grid = layer, grid
        self._turn = threading.Lock()

    def open(self, image: str | Path | Image.Image | Photograph | None = None) -> "OpenedPicture":
        """A picture with what the model predicts for it, ready to be explained.

        Args:
            image (str, Path or PIL.Image, optional): As for ``explain``, or a ``Photograph``, which has been read

        Raises:
            ValueError: If the picture cannot be read, or if there is no such layer.
            TypeError: If the model does not return a tensor.
            RuntimeError: If the model's scores are not finite.
            OSError: If there is no such picture.
        """
        photograph, classifier = _read(image), self.classifier
        try:
            pixels = classifier.preprocessing.crop(photograph.image)
        except ValueError as error:
            raise PictureError(f"{photograph.name} cannot be explained: {error}") from error
        inputs = classifier.preprocessing.normalize(pixels).to(self.place)
        with self.in_turn():
            # Two rows, so that a model that returns one row for any batch is found.
            scores = classifier.scores(torch.cat([inputs, inputs]))[:1]
            feature_map = choose_layer(classifier.model, inputs, self._layer, self._grid)
        prediction = Prediction(
            image=photograph.name,
            model=classifier.name,
            weights=self.weights,
            layer=feature_map.name,
            feature_map=feature_map,
            categories=classifier.categories,
            probabilities=classifier.probabilities(scores)[0].cpu(),
            pixels=pixels,
            frame=classifier.preprocessing.frame(*photograph.image.size),
            notes=(f"{photograph.name}: {photograph.note}",) if photograph.note else (),
        )
        return OpenedPicture(self, prediction, inputs)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """This thread's turn with the model: in evaluation mode, giving its scores alone, and as it was afterwards."""
        while not self._turn.acquire(timeout=_PATIENCE_SECONDS):
            tell(Progress("Waiting for its turn", 0, 1))
        try:
            with _evaluating(self.classifier.model):
                yield
        finally:
            self._turn.release()


class OpenedPicture:
    """A picture that ``Explainer.open`` gives. What is asked for again is remembered, and so is what it is made of.

    Another percentile or weighting makes a fusion anew of the attributions that are there. Asked for one method at a
    time, each map is there as soon as it is ready.
    """

    def __init__(self, explainer: Explainer, prediction: Prediction, inputs: Tensor) -> None:
        self.explainer = explainer
        self.prediction = prediction
        """What the model sees in the picture."""
        self.inputs = inputs
        r"""The picture as it enters the model, (1, 3, \*S)."""
        self._attributions: dict[tuple[str, int, float], Tensor] = {}
        self._made: dict[tuple[Any, ...], CachedMap] = {}

    def explain(
        self,
        target: int | str | None = None,
        methods: Sequence[str] = (),
        *,
        percentile: float = 10.0,
        weighting: Weighting = "normalized",
        tolerance: float = 0.0,
        show_progress: bool = False,
    ) -> Explanation:
        """Explains the picture; the function ``explain`` tells what its arguments are, and what it returns and raises.

        Args:
            target (int or str, optional): Default: None
            methods (list[str], optional): Default: the stages of Fusion-CAM
            percentile (float, optional): Default: 10.0
            weighting (str, optional): Default: "normalized"
            tolerance (float, optional): Default: 0.0
            show_progress (bool, optional): Default: False
        """
        chosen = _checked(methods, percentile, weighting, tolerance)
        probabilities = self.prediction.probabilities
        index = (
            int(probabilities.argmax())
            if target is None
            else self.explainer.classifier.target(str(target), len(probabilities))
        )
        request = Request(index, percentile, tolerance, show_progress)
        maps: dict[str, Tensor] = {}
        kept: dict[str, float] = {}
        stages: dict[str, FusionCamStages] = {}
        for method in chosen or [parse_method("fusion-cam", weighting)]:
            cached = self._remembered(method, request, staged=not chosen)
            maps |= cached.maps
            kept |= cached.kept
            if cached.stages is not None:
                stages[method.name] = cached.stages
        empty = [
            f"The map of {label} is empty: by it nothing speaks for the class"
            for label in maps
            if not maps[label].any()
        ]
        seen = vars(self.prediction) | {"notes": (*self.prediction.notes, *empty)}
        return Explanation(
            **seen,
            target=index,
            percentile=percentile,
            weighting=weighting,
            tolerance=tolerance,
            maps=maps,
            kept=kept,
            stages=stages,
        )

    def curves(self, explanation: Explanation, name: str, steps: int = 50, show_progress: bool = False) -> Curves:
        """Judges one of the maps of an explanation of this picture by insertion and deletion.

        Args:
            explanation (Explanation): What ``explain`` returned.
            name (str): The name of the map in it.
            steps (int, optional): In how many steps all pixels are restored or removed. Default: 50
            show_progress (bool, optional): Default: False
        """
        classifier = self.explainer.classifier
        drawn = []
        for metric in (insertion, deletion):
            with self.explainer.in_turn():
                area, fractions, probabilities = metric(
                    classifier.model,
                    self.inputs,
                    explanation.maps[name].to(self.inputs),
                    target=explanation.target,
                    steps=steps,
                    activation=classifier.activation,
                    show_progress=show_progress,
                    return_curve=True,
                )
            drawn.append(Curve(float(area), fractions.cpu(), probabilities[0].cpu()))
        return Curves(*drawn)

    def _remembered(self, method: Method, request: "Request", *, staged: bool) -> "CachedMap":
        percentile = request.percentile if method.has_percentile else None
        key = (method, staged, request.target, percentile, request.tolerance_of(method))
        if key not in self._made:
            with self.explainer.in_turn(), self.prediction.feature_map.view() as layer:
                self._made[key] = self._make(layer, method, request, staged)
            for oldest in list(self._made)[:-_REMEMBERED]:
                del self._made[oldest]
        return self._made[key]

    def _make(self, layer: nn.Module, method: Method, request: "Request", staged: bool) -> "CachedMap":
        stages = None
        if method.components is not None:
            options = {"percentile": request.percentile, "weighting": method.weighting, "return_stages": True}
            values, stages = self._attribute(layer, method, request, **options)
            stages = FusionCamStages(*(part.cpu() for part in stages))
        elif method.has_percentile:
            values = self._attribute(layer, method, request, percentile=request.percentile)
        else:
            values = self._attributions_of(layer, method, request)
        size = tuple(self.inputs.shape[2:])
        maps = _stage_maps(stages) if staged and stages else {method.name: saliency_map(values, size).cpu()}
        classifier = self.explainer.classifier
        kept = {}
        for label, part in maps.items():
            masked = classifier.scores(self.inputs * part.to(self.inputs))
            kept[label] = float(classifier.probabilities(masked)[0, request.target])
        return CachedMap(maps, kept, stages)

    def _attributions_of(self, layer: nn.Module, method: Method, request: "Request") -> Tensor:
        """The attributions of a method by itself, which fusions share."""
        key = (method.name, request.target, request.tolerance_of(method))
        if key not in self._attributions:
            # Without the graph, which holds all that the model computed.
            self._attributions[key] = self._attribute(layer, method, request).detach()
        return self._attributions[key]

    def _attribute(self, layer: nn.Module, method: Method, request: "Request", **options: Any) -> Any:
        """What a method attributes, made of parts that are remembered."""
        classifier = self.explainer.classifier
        network = classifier.model
        parts: dict[str, Attribution] = {}
        for name in method.parts:
            parts[name] = KnownAttribution(network, layer, self._attributions_of(layer, Method(name), request))
        attribution = method.build(network, layer, parts, classifier.activation, tolerance=request.tolerance)
        if "show_progress" in signature(attribution.attribute).parameters:
            options["show_progress"] = request.show_progress
        try:
            return attribution.attribute(self.inputs.clone(), target=request.target, **options)
        except Exception as error:
            raise RuntimeError(f"{method.name} fails: {reason(error)}") from error


class Request(NamedTuple):
    """What is asked of each method."""

    target: int
    percentile: float
    tolerance: float
    show_progress: bool

    def tolerance_of(self, method: Method) -> float:
        """The tolerance as far as it concerns a method."""
        return self.tolerance if method.has_tolerance else 0.0


class CachedMap(NamedTuple):
    """What a method made: its map, or its stages, and what each keeps."""

    maps: dict[str, Tensor]
    kept: dict[str, float]
    stages: FusionCamStages | None


def _checked(methods: Sequence[str], percentile: float, weighting: Weighting, tolerance: float) -> list[Method]:
    """The methods that are asked for."""
    check_percentile(percentile)
    check_weighting(weighting)
    check_tolerance(tolerance)
    return [parse_method(method, weighting) for method in methods]


def explain(
    image: str | Path | Image.Image | None = None,
    *,
    model: str | nn.Module | None = None,
    weights: str | None = None,
    layer: str | None = None,
    grid: tuple[int, int] | None = None,
    target: int | str | None = None,
    methods: Sequence[str] = (),
    percentile: float = 10.0,
    weighting: Weighting = "normalized",
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
        image (str, Path or PIL.Image, optional): The picture. Default: None, which means the sample that the demo
            extra brings, photographs of a cup of espresso and of a cat, one above the other
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
        percentile (float, optional): The percentile of the denoising step of Fusion-CAM and Union-CAM, in [0, 100).
            Default: 10.0
        weighting (str, optional): How the fusions that name none weigh their maps, see ``LayerFusionCam``:
            "normalized", "raw" or "released". Default: "normalized"
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
    _checked(methods, percentile, weighting, tolerance)
    photograph = _read(image)
    explainer = Explainer(
        model,
        weights=weights,
        layer=layer,
        grid=grid,
        size=size,
        mean=mean,
        std=std,
        activation=activation,
        device=device,
    )
    return explainer.open(photograph).explain(
        target,
        methods,
        percentile=percentile,
        weighting=weighting,
        tolerance=tolerance,
        show_progress=show_progress,
    )


def _read(image: str | Path | Image.Image | Photograph | None) -> Photograph:
    if isinstance(image, Photograph):
        return image
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if image is not None:
        return open_photograph(Path(image))
    return sample_photograph()


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
