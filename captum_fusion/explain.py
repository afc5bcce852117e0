"""Explanations of images as values, for Python; the command and the page draw them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from typing_extensions import Unpack

from captum_fusion._app.explainer import ClassifiedImage, Explainer, checked_methods, read_image
from captum_fusion._app.explanation import Curve, Curves, Explanation, Prediction
from captum_fusion._app.options import DEFAULT_WEIGHTING, ModelOptions
from captum_fusion.arguments import Weighting

__all__ = ["ClassifiedImage", "Curve", "Curves", "Explainer", "Explanation", "ModelOptions", "Prediction", "explain"]


def explain(
    image: str | Path | Image.Image | None = None,
    *,
    model: str | nn.Module | None = None,
    target: int | str | None = None,
    methods: Sequence[str] = (),
    percentile: float = 10.0,
    weighting: Weighting = DEFAULT_WEIGHTING,
    tolerance: float = 0.0,
    show_progress: bool = False,
    **options: Unpack[ModelOptions],
) -> Explanation:
    r"""Explains one image: computes maps of the image regions that support a class.

    Args:
        image (str, Path or PIL.Image, optional): The image. Default: None, which means the sample of the demo extra,
            photographs of a cup of espresso and of a cat, one above the other
        model (str or Module, optional): A torchvision classifier such as "resnet50"; "timm:NAME"; "hf:NAME" or
            "hf:FOLDER" for an image classifier of Hugging Face; "package.module:callable" for a callable that returns a
            model; or a model object, which stays on its device. A model of timm brings its preprocessing. Default:
            None, which means the EfficientNet-Lite0 of the demo extra with its ImageNet weights
        target (int or str, optional): The class to explain: an index, a category name or an ImageNet WordNet id.
            Default: None, which means the predicted class
        methods (list[str], optional): Names of methods, such as "grad-cam", "fusion-cam:raw" or
            "fusion(x-grad-cam,group-cam)". Default: the stages of Fusion-CAM
        percentile (float, optional): The percentile of the denoising step of Fusion-CAM and Union-CAM, in [0, 100).
            Default: 10.0
        weighting (str, optional): The weighting of fusions whose name has no weighting, see ``LayerFusionCam``: "raw",
            "released" or "normalized". Default: "raw"
        tolerance (float, optional): The largest estimated error of Score-CAM's map, alone or in a fusion, in [0, 1),
            see ``LayerScoreCam``. Default: 0.0, which is exact
        show_progress (bool, optional): Whether to show progress. Default: False
        **options: The options of the model, see ``ModelOptions``: weights, layer, grid, size, mean, std, activation,
            classes, device and precision

    Returns:
        *Explanation* with the maps at the input's resolution, on the CPU. A model object is left unchanged.

    Raises:
        ValueError: If a name is unknown, or if the image cannot be read.
        TypeError: If an option is unknown, or if the model does not return a tensor.
        RuntimeError: If the model's scores are not finite.
        OSError: If the image does not exist, or if weights cannot be read.

    Examples::

        >>> from torchvision.models import resnet18
        >>> explanation = explain(
        ...     Image.new("RGB", (80, 60), "teal"), model=resnet18(weights=None), methods=["grad-cam"], size=64
        ... )
        >>> explanation.layer, explanation.maps["grad-cam"].shape
        ('layer4', torch.Size([1, 1, 64, 64]))
    """
    checked_methods(methods, percentile, weighting, tolerance)
    photograph = read_image(image)
    return (
        Explainer(model, **options)
        .open(photograph)
        .explain(
            target,
            methods,
            percentile=percentile,
            weighting=weighting,
            tolerance=tolerance,
            show_progress=show_progress,
        )
    )


def __getattr__(name: str) -> Any:
    """Gives a former name, for one release."""
    if name == "OpenedPicture":
        warnings.warn("OpenedPicture is now ClassifiedImage", DeprecationWarning, stacklevel=2)
        return ClassifiedImage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
