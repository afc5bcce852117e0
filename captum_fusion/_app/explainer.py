"""Explains many images with one model."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Unpack

from captum_fusion import FeatureMap, FusionCamStages, feature_maps
from captum_fusion._app.explanation import Curve, Curves, Explanation, Prediction
from captum_fusion._app.images import ImageError, Photograph, as_rgb, open_photograph, sample_photograph
from captum_fusion._app.messages import reason
from captum_fusion._app.methods import Method, parse_method
from captum_fusion._app.models.classifier import Classifier
from captum_fusion._app.models.layer import choose_layer
from captum_fusion._app.models.loading import autocast, find_device, load_classifier, return_scores
from captum_fusion._app.options import DEFAULT_WEIGHTING, ModelOptions, Precision
from captum_fusion.arguments import Weighting, check_activation, check_percentile, check_tolerance, check_weighting
from captum_fusion.metrics import deletion, insertion, saliency_map

# An image caches the maps of this many combinations of method, percentile and weighting.
_MOST_MAPS = 64


class Explainer:
    """A classifier that is loaded once to explain many images; threads that share it take turns.

    Args:
        model (str or Module, optional): The model, see ``explain``
        **options: The options of the model, see ``ModelOptions``

    Raises:
        ValueError: If a name is unknown.
        TypeError: If an option is unknown, or if the model is not a module.
        OSError: If weights cannot be read.

    Examples::

        >>> from torchvision.models import resnet18
        >>> explainer = Explainer(resnet18(weights=None), size=64)
        >>> image = explainer.open(Image.new("RGB", (80, 60), "teal"))
        >>> for index, name, probability in image.prediction.top(2):
        ...     explanation = image.explain(index, ["grad-cam"])
        ...     explanation.maps["grad-cam"].shape
        torch.Size([1, 1, 64, 64])
        torch.Size([1, 1, 64, 64])
    """

    def __init__(self, model: str | nn.Module | None = None, **options: Unpack[ModelOptions]) -> None:
        unknown = options.keys() - ModelOptions.__annotations__
        if unknown:
            raise TypeError(
                f"Unknown option {min(unknown)!r}; expected some of {', '.join(ModelOptions.__annotations__)}"
            )
        check_activation(options.get("activation"))
        self.weights = options.get("weights") or "default"
        loading: dict[str, Any] = {**options}
        popped = (loading.pop(name, None) for name in ("device", "layer", "grid", "precision"))
        device, self._layer, self._grid, precision = popped
        self.precision = precision or "float32"
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision is {self.precision!r}; expected one of {get_args(Precision)}")
        self.classifier = load_classifier(model, **loading)
        network = self.classifier.model
        if isinstance(model, nn.Module):
            if device is not None:
                raise ValueError(f"device is {device!r}, but a model object stays on its own device; move it yourself")
            self.device = next(iter(network.parameters()), torch.empty(0)).device
        else:
            self.device = find_device(device)
            network.to(self.device)
        self._turn = threading.Lock()

    def open(self, image: str | Path | Image.Image | Photograph | None = None) -> "ClassifiedImage":
        """Reads and classifies an image, which is then ready to be explained.

        Args:
            image (str, Path or PIL.Image, optional): The image, see ``explain``, or a ``Photograph`` in memory

        Raises:
            ValueError: If the image cannot be read, or if the layer does not exist.
            TypeError: If the model does not return a tensor.
            RuntimeError: If the model's scores are not finite.
            OSError: If the image does not exist.
        """
        photograph, classifier = read_image(image), self.classifier
        try:
            pixels = classifier.preprocessing.crop(photograph.image)
        except ValueError as error:
            raise ImageError(f"{photograph.name} cannot be explained: {error}") from error
        inputs = classifier.preprocessing.normalize(pixels).to(self.device)
        with self.in_turn():
            probabilities = _probabilities(classifier, inputs)
            feature_map = choose_layer(classifier.model, inputs, self._layer, self._grid)
        notes = [f"{photograph.name}: {photograph.note}"] if photograph.note else []
        if self.precision != "float32":
            notes.append(f"The forward passes ran in {self.precision}")
        prediction = Prediction(
            image=photograph.name,
            model=classifier.name,
            weights=self.weights,
            precision=self.precision,
            layer=feature_map.name,
            feature_map=feature_map,
            categories=classifier.categories,
            probabilities=probabilities,
            pixels=pixels,
            frame=classifier.preprocessing.frame(*photograph.image.size),
            notes=tuple(notes),
        )
        return ClassifiedImage(self, prediction, inputs)

    def layers(self) -> list[FeatureMap]:
        """Lists the layers that can be explained, in the order in which they run."""
        with self.in_turn():
            candidates = feature_maps(self.classifier.model, self.classifier.preprocessing.blank(self.device))
        return [each for each in candidates.values() if isinstance(each, FeatureMap)]

    def default_layer(self) -> str | None:
        """Returns the name of the default layer; None if you must choose a layer."""
        with self.in_turn(), suppress(ValueError):
            return choose_layer(self.classifier.model, self.classifier.preprocessing.blank(self.device), None).name
        return None

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """This thread's turn with the model: in evaluation mode, returning its scores alone, restored afterwards.

        Everything that runs the model runs in here, so in the explainer's precision.
        """
        network = self.classifier.model
        with self._turn, autocast(self.device, self.precision):
            training = [module for module in network.modules() if module.training]
            network.eval()
            try:
                with return_scores(network):
                    yield
            finally:
                for module in training:
                    module.training = True


class ClassifiedImage:
    """An image with the prediction of a model, ready to be explained, as ``Explainer.open`` returns it.

    Maps and shared attributions are cached: another percentile or weighting reuses the same attributions. Other weights
    of the model clear the cache, unless they were written through ``.data``, which leaves no trace: then open the image
    again. To get each map as soon as it is ready, call ``explain`` for one method at a time.
    """

    def __init__(self, explainer: Explainer, prediction: Prediction, inputs: Tensor) -> None:
        self.explainer = explainer
        self.prediction = prediction
        """The prediction of the model."""
        self.inputs = inputs
        r"""The image as it enters the model, (1, 3, \*S)."""
        self._attributions: dict[tuple[str, int, float], Tensor] = {}
        self._maps: dict[tuple[Any, ...], CachedMap] = {}
        self._versions = _versions(explainer.classifier.model)

    def explain(
        self,
        target: int | str | None = None,
        methods: Sequence[str] = (),
        *,
        percentile: float = 10.0,
        weighting: Weighting = DEFAULT_WEIGHTING,
        tolerance: float = 0.0,
        show_progress: bool = False,
    ) -> Explanation:
        """Explains the image. The function ``explain`` describes the arguments, the result and the errors.

        Args:
            target (int or str, optional): Default: None
            methods (list[str], optional): Default: the stages of Fusion-CAM
            percentile (float, optional): Default: 10.0
            weighting (str, optional): Default: "raw"
            tolerance (float, optional): Default: 0.0
            show_progress (bool, optional): Default: False
        """
        parsed = checked_methods(methods, percentile, weighting, tolerance)
        self._refresh()
        probabilities = self.prediction.probabilities
        index = (
            int(probabilities.argmax())
            if target is None
            else self.explainer.classifier.target(target, len(probabilities))
        )
        request = Request(index, percentile, tolerance, show_progress)
        maps: dict[str, Tensor] = {}
        masked_probabilities: dict[str, float] = {}
        stages: dict[str, FusionCamStages] = {}
        for method in parsed or [parse_method("fusion-cam", weighting)]:
            cached = self._cached_map(method, request, staged=not parsed)
            maps |= cached.maps
            masked_probabilities |= cached.masked_probabilities
            if cached.stages is not None:
                stages[method.name] = cached.stages
        empty = [f"{label} found no positive evidence for the class" for label in maps if not maps[label].any()]
        prediction = vars(self.prediction) | {"notes": (*self.prediction.notes, *empty)}
        return Explanation(
            **prediction,
            target=index,
            percentile=percentile,
            weighting=weighting,
            tolerance=tolerance,
            maps=maps,
            masked_probabilities=masked_probabilities,
            stages=stages,
        )

    def curves(self, explanation: Explanation, name: str, steps: int = 50, show_progress: bool = False) -> Curves:
        """Computes the insertion and the deletion curve of a map of this image.

        Args:
            explanation (Explanation): A result of ``explain``.
            name (str): The name of a map in the explanation.
            steps (int, optional): The number of steps in which all pixels are restored or removed. Default: 50
            show_progress (bool, optional): Default: False
        """
        classifier = self.explainer.classifier
        curves = []
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
            curves.append(Curve(float(area), fractions.cpu(), probabilities[0].cpu()))
        return Curves(*curves)

    def _refresh(self) -> None:
        """Clears what other weights of the model have computed."""
        versions = _versions(self.explainer.classifier.model)
        if versions != self._versions:
            self._attributions.clear()
            self._maps.clear()
            with self.explainer.in_turn():
                probabilities = _probabilities(self.explainer.classifier, self.inputs)
            self.prediction = replace(self.prediction, probabilities=probabilities)
            self._versions = versions

    def _cached_map(self, method: Method, request: "Request", *, staged: bool) -> "CachedMap":
        percentile = request.percentile if method.has_percentile else None
        key = (method, staged, request.target, percentile, request.tolerance_of(method))
        if key not in self._maps:
            with self.explainer.in_turn(), self.prediction.feature_map.view() as layer:
                self._maps[key] = self._map(layer, method, request, staged)
            for oldest in list(self._maps)[:-_MOST_MAPS]:
                del self._maps[oldest]
        return self._maps[key]

    def _map(self, layer: nn.Module, method: Method, request: "Request", staged: bool) -> "CachedMap":
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
        masked_probabilities = {}
        for label, part in maps.items():
            scores = classifier.scores(self.inputs * part.to(self.inputs))
            masked_probabilities[label] = float(classifier.probabilities(scores)[0, request.target])
        return CachedMap(maps, masked_probabilities, stages)

    def _attributions_of(self, layer: nn.Module, method: Method, request: "Request") -> Tensor:
        """The attributions of a method by itself, which fusions share."""
        key = (method.name, request.target, request.tolerance_of(method))
        if key not in self._attributions:
            # Without the graph, which holds all that the model computed.
            self._attributions[key] = self._attribute(layer, method, request).detach()
        return self._attributions[key]

    def _attribute(self, layer: nn.Module, method: Method, request: "Request", **options: Any) -> Any:
        """The attributions of a method, from cached ones of its parts."""
        classifier = self.explainer.classifier
        for argument, name in zip(method.part_arguments, method.parts, strict=True):
            options[argument] = self._attributions_of(layer, Method(name), request)
        attribution = method.build(classifier.model, layer, classifier.activation, tolerance=request.tolerance)
        if "show_progress" in signature(attribution.attribute).parameters:
            options["show_progress"] = request.show_progress
        try:
            return attribution.attribute(self.inputs.clone(), target=request.target, **options)
        except Exception as error:
            raise RuntimeError(f"{method.name} fails: {reason(error)}") from error


class Request(NamedTuple):
    """The arguments that the methods of an explanation share."""

    target: int
    percentile: float
    tolerance: float
    show_progress: bool

    def tolerance_of(self, method: Method) -> float:
        """The tolerance as far as it concerns a method."""
        return self.tolerance if method.has_tolerance else 0.0


class CachedMap(NamedTuple):
    """The map of a method, or its stages, with the probability that each leaves of the target."""

    maps: dict[str, Tensor]
    masked_probabilities: dict[str, float]
    stages: FusionCamStages | None


def checked_methods(methods: Sequence[str], percentile: float, weighting: Weighting, tolerance: float) -> list[Method]:
    """The methods of these names, after all arguments of the methods have been checked."""
    check_percentile(percentile)
    check_weighting(weighting)
    check_tolerance(tolerance)
    return [parse_method(method, weighting) for method in methods]


def read_image(image: str | Path | Image.Image | Photograph | None) -> Photograph:
    """The photograph of any form of an image; without one, the sample."""
    if isinstance(image, Photograph):
        return image
    if isinstance(image, Image.Image):
        return as_rgb(image)
    return sample_photograph() if image is None else open_photograph(Path(image))


def _probabilities(classifier: Classifier, inputs: Tensor) -> Tensor:
    """The probability of each class for one example, shape (K,)."""
    # Two rows, so that a model that returns one row for any batch is found.
    scores = classifier.scores(torch.cat([inputs, inputs]))[:1]
    return classifier.probabilities(scores)[0].cpu()


def _versions(network: nn.Module) -> list[tuple[int, int]]:
    """The identity and version of each weight and buffer: training and ``load_state_dict`` count up the version."""
    tensors = (*network.parameters(), *network.buffers())
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _stage_maps(stages: FusionCamStages) -> dict[str, Tensor]:
    return {
        "Grad-CAM": stages.gradient,
        "Denoised Grad-CAM": stages.denoised,
        "Score-CAM": stages.region,
        "Combined": stages.combined,
        "Fusion-CAM": stages.fused,
    }
