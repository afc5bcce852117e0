"""The command ``captum-fusion``."""

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import App, Parameter
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from captum_fusion import LayerFusionCam
from captum_fusion._methods import METRICS, Method, Precision, RememberedScoreCam, Target, parse_method
from captum_fusion._models import Classifier, find_layer, last_feature_map, load_classifier
from captum_fusion._picture import draw, supported_suffixes
from captum_fusion._scorer import scoring
from captum_fusion.metrics import saliency_map

app = App(
    name="captum-fusion",
    help="Explains image classifiers with class activation maps: Fusion-CAM and the methods it is made of.",
    version=version("captum-fusion"),
)


@app.command
def explain(
    image: Path | None = None,
    *,
    model: str | None = None,
    weights: str | None = None,
    layer: str | None = None,
    target: str | None = None,
    methods: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    output: Path = Path("fusion_cam.png"),
    save_npz: Path | None = None,
    size: int | None = None,
    mean: Annotated[tuple[float, float, float] | None, Parameter(negative="")] = None,
    std: Annotated[tuple[float, float, float] | None, Parameter(negative="")] = None,
    device: str | None = None,
) -> None:
    """Explain one picture: which of its parts speak for a class.

    Args:
        image: The picture. Without it, the photograph of a cup of espresso that the demo extra brings.
        model: A torchvision classifier such as resnet50, or package.module:callable that returns a model. Without it,
            the EfficientNet-Lite0 of the demo extra with its ImageNet weights.
        weights: A file with a state dict, or "none" for seeded random weights (a dry run that needs no network).
            Without it, the default weights of the model.
        layer: The dotted name of the layer to explain. Without it, the last one whose output is a feature map.
        target: The class to explain, an index or a category name. Without it, the predicted class.
        methods: Any of grad-cam, grad-cam++, x-grad-cam, group-cam, score-cam, union-cam, fusion-cam, Captum's input
            methods such as integrated-gradients, and "fusion(gradient,region)" for two of them; a panel for each.
            Without it, the stages of Fusion-CAM.
        output: The picture to write.
        save_npz: A file for the raw maps and their metadata.
        size: Input size in pixels. Without it, that of the torchvision weights, else 224.
        mean: Mean of each channel. Without it, that of the torchvision weights, else ImageNet's.
        std: Standard deviation of each channel. Without it, that of the torchvision weights, else ImageNet's.
        device: Where to compute. Without it, cuda if there is one, else cpu.
    """
    _check_output(output)
    if save_npz is not None:
        _check_folder(save_npz)
    chosen = [parse_method(method) for method in methods]
    picture = _open_image(image)
    classifier = load_classifier(model, weights, size, mean, std)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = classifier.model.to(place)
    pixels = classifier.preprocessing.crop(picture)
    inputs = classifier.preprocessing.normalize(pixels).to(place)
    layer_name = layer or last_feature_map(network, inputs)
    module = find_layer(network, layer_name)

    with torch.no_grad():
        probabilities = network(inputs).softmax(dim=1)[0].cpu()
    index = int(probabilities.argmax()) if target is None else classifier.target(target, len(probabilities))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(_top(classifier, probabilities))
    console.print(f"Explaining {index} {classifier.category(index)} by the layer {layer_name}")

    if chosen:
        score_cam = RememberedScoreCam(network, module)
        maps = {method.name: _method_map(method, network, module, score_cam, inputs, index) for method in chosen}
    else:
        maps = _stage_maps(network, module, inputs, index)
    kept = _probabilities_kept(network, module, inputs, index, torch.cat(list(maps.values())))
    panels: dict[str, Tensor | None] = {f"photograph: {probabilities[index]:.1%}": None}
    panels |= {f"{name} keeps {share:.1%}": maps[name] for name, share in zip(maps, kept, strict=True)}
    title = (
        f"{classifier.category(index)} by {classifier.name}, layer {layer_name}, and what remains of its probability"
    )
    draw(output, title, pixels, panels)
    if save_npz is not None:
        metadata = {
            "image": str(image or "skimage.data.coffee"),
            "model": classifier.name,
            "weights": weights or "default",
            "layer": layer_name,
            "target": index,
            "category": classifier.category(index),
            "probability": float(probabilities[index]),
            "probability_kept": dict(zip(maps, kept, strict=True)),
            "version": version("captum-fusion"),
        }
        arrays: dict[str, Any] = {name: values[0, 0].cpu().numpy() for name, values in maps.items()}
        with save_npz.open("wb") as file:
            np.savez_compressed(file, metadata=json.dumps(metadata), pixels=pixels[0].numpy(), **arrays)
        console.print(f"Maps: {save_npz}")
    console.print(f"Picture: {output}")


@app.command
def benchmark(
    *,
    images: str,
    output: Path,
    model: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ("efficientnet-lite0",),
    layer: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    weights: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    labels: Path | None = None,
    methods: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (
        "grad-cam",
        "score-cam",
        "fusion-cam",
    ),
    metrics: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = METRICS[:4],
    percentile: Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative="")] = (10.0,),
    stages: bool = False,
    target: Target = "predicted",
    limit: int | None = None,
    seed: int | None = None,
    steps: int = 100,
    device: str | None = None,
    precision: Precision = "float32",
    batch_size: int = 1,
    strict: bool = False,
) -> None:
    """Explain many pictures with many methods and judge the explanations.

    Started again with the same arguments, it goes on where it was. Under torchrun, the processes share the pictures.

    Args:
        images: A folder of pictures, a folder with a folder for each class, or imagenet:ROOT, voc2007:ROOT or
            voc2012:ROOT for a torchvision dataset that is on disk.
        output: The folder for the records and the report.
        model: One or more classifiers, named as for explain.
        layer: The dotted name of a layer for each model. Without it, the last one whose output is a feature map.
        weights: For each model a file with a state dict, or "none" for seeded random weights. Without it, the default
            weights.
        labels: A JSON file with the class index of each picture of a plain folder, by its name.
        methods: Methods named as for explain; a fusion may name its weighting, as fusion-cam:raw.
        metrics: Any of confidence_drop, confidence_increase, insertion, deletion, pointing_game,
            energy_pointing_game.
        percentile: One or more percentiles of the denoising step.
        stages: Judge the stages of each fusion as well.
        target: Explain the predicted class, or each label of a picture.
        limit: How many pictures to take.
        seed: Take a random choice of them instead of the first ones.
        steps: Steps of insertion and deletion.
        device: Where to compute. Without it, cuda if there is one, else cpu.
        precision: float32, or bfloat16 or float16 for autocast.
        batch_size: Pictures that are explained together.
        strict: Stop at a picture that cannot be read or a method that fails.
    """
    # pandas and SciPy take a second that explain need not wait for.
    from captum_fusion.benchmark import run as run_benchmark

    run_benchmark(
        images,
        output,
        models=model,
        layers=layer,
        weights=weights,
        labels=labels,
        methods=methods,
        metrics=metrics,
        percentiles=percentile,
        stages=stages,
        target=target,
        limit=limit,
        seed=seed,
        steps=steps,
        device=device,
        precision=precision,
        batch_size=batch_size,
        strict=strict,
        show_progress=True,
    )


@app.command
def report(folder: Path) -> None:
    """Make the tables and pictures of a benchmark again from its records.

    Args:
        folder: The output folder of a benchmark.
    """
    from captum_fusion.benchmark import report as write_report

    write_report(folder)


def _check_folder(file: Path) -> None:
    if not file.parent.is_dir():
        raise ValueError(f"The folder {file.parent} of {file} does not exist")


def _check_output(output: Path) -> None:
    _check_folder(output)
    known = supported_suffixes()
    if output.suffix.lower() not in known:
        raise ValueError(f"A picture cannot be written as {output.name}; expected one of {', '.join(sorted(known))}")


def _open_image(file: Path | None) -> Image.Image:
    if file is None:
        try:
            from skimage import data
        except ModuleNotFoundError as error:
            raise ValueError(
                f"The sample photograph needs the package {error.name}: pip install 'captum-fusion[demo]', "
                "or give a picture"
            ) from error
        return Image.fromarray(data.coffee())
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is not a picture that can be read") from error


def _top(classifier: Classifier, probabilities: Tensor) -> Table:
    table = Table(title=f"{classifier.name} predicts")
    table.add_column("index", justify="right")
    table.add_column("category")
    table.add_column("probability", justify="right")
    for probability, index in zip(*probabilities.topk(min(5, len(probabilities))), strict=True):
        table.add_row(str(int(index)), classifier.category(int(index)), f"{probability:.1%}")
    return table


def _method_map(
    method: Method,
    network: torch.nn.Module,
    layer: torch.nn.Module,
    score_cam: RememberedScoreCam,
    inputs: Tensor,
    target: int,
) -> Tensor:
    attribution = method.build(network, layer, score_cam)
    weighting = {"weighting": method.weighting} if isinstance(attribution, LayerFusionCam) else {}
    return saliency_map(attribution.attribute(inputs, target=target, **weighting), tuple(inputs.shape[2:]))


def _stage_maps(network: torch.nn.Module, layer: torch.nn.Module, inputs: Tensor, target: int) -> dict[str, Tensor]:
    _, stages = LayerFusionCam(network, layer).attribute(inputs, target, show_progress=True, return_stages=True)
    return {
        "Grad-CAM": stages.gradient,
        "Denoised Grad-CAM": stages.denoised,
        "Score-CAM": stages.region,
        "Combined": stages.combined,
        "Fusion-CAM": stages.fused,
    }


def _probabilities_kept(
    network: torch.nn.Module, layer: torch.nn.Module, inputs: Tensor, target: int, maps: Tensor
) -> list[float]:
    """The class probability of the picture masked by each map."""
    with scoring(network, inputs, target, None, baselines=None, activation="softmax", layer=layer) as scorer:
        kept: list[float] = scorer.scores_of_maps(maps.movedim(0, 1))[0].tolist()
    return kept


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; what goes wrong is one line on standard error."""
    try:
        app(arguments, result_action="return_value")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        sys.stderr.write(f"captum-fusion: {error}\n")
        return 2
    return 0
