"""The calls of Captum's tutorials, with our classes in place of its layer attributions, on small models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    LayerAttribution,
    LayerGradientXActivation,
    NoiseTunnel,
    configure_interpretable_embedding_layer,
    remove_interpretable_embedding_layer,
    visualization,
)
from captum.attr._utils.input_layer_wrapper import ModelInputWrapper
from captum.concept import TCAV, Classifier, Concept
from captum.robust import FGSM, PGD, AttackComparator, MinParamPerturbation
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_fusion import (
    LayerFinerCam,
    LayerFusionCam,
    LayerGradCamPlusPlus,
    LayerGroupCam,
    LayerHiResCam,
    LayerScoreCam,
)
from tests.conftest import SmallNet
from tests.methods import Rise, at_input_size, has_input_shape, takes

# What Captum says of inputs that it sets to require gradients.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:captum")

# A gradient method at the layer's resolution, and a masked one at the input's.
TWO = [LayerHiResCam, LayerFusionCam]


@pytest.mark.parametrize("algorithm", [*TWO, Rise])
def test_torchvision_interpret(algorithm: Any, net: SmallNet, images: Tensor) -> None:
    """Squared noise around the method, then pictures of it beside the original."""
    image = images[:1]
    with torch.no_grad():
        _, label = net(image).softmax(dim=1).topk(1)
    label.squeeze_()  # A tensor without dimensions is the target.
    tunnel = NoiseTunnel(algorithm(net, net.features))
    attributions = tunnel.attribute(
        image, nt_samples=4, nt_samples_batch_size=2, nt_type="smoothgrad_sq", stdevs=0.1, target=label
    )
    attributions = at_input_size(attributions, image)
    drawn, axes = visualization.visualize_image_attr_multiple(
        np.transpose(attributions.squeeze().cpu().detach().numpy(), (1, 2, 0)),
        np.transpose(image.squeeze().cpu().detach().numpy(), (1, 2, 0)),
        ["original_image", "heat_map", "blended_heat_map", "masked_image"],
        ["all", "positive", "positive", "positive"],
        show_colorbar=True,
        use_pyplot=False,
    )
    assert isinstance(drawn, Figure)
    assert len(axes) == 4
    assert all(axis.images for axis in axes)


@pytest.mark.parametrize("algorithm", [LayerGradCamPlusPlus, LayerFinerCam])
def test_cifar_robustness_attacks_an_explanation(algorithm: type[LayerAttribution], images: Tensor) -> None:
    """FGSM and PGD towards another map, and the least step that changes where it is largest."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    attribution = algorithm(model, model[1])

    def explain(inputs: Tensor) -> Tensor:
        # With its weights differentiated as well: otherwise a step along the gradient may go the wrong way.
        maps = attribution.attribute(inputs, target=1, grad_kwargs={"create_graph": True})
        return maps.flatten(1).softmax(dim=1)

    pixel = 7

    def loss(explained: Tensor, _: object) -> Tensor:
        # Captum's FGSM takes gradients below 1e-6 for zero.
        return -1e6 * explained[:, pixel]

    moved = FGSM(explain, loss).perturb(images, epsilon=0.01, target=pixel)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(explain(leaf), None).sum(), leaf)
    step = 0.01 * torch.where(gradient.abs() > 1e-6, gradient.sign(), 0)
    torch.testing.assert_close(moved, images + step)
    assert step.any()
    fgsm = FGSM(explain, lower_bound=0, upper_bound=1)
    perturbed = fgsm.perturb(images, epsilon=0.16, target=pixel, targeted=True)
    assert explain(perturbed)[:, pixel].gt(explain(images)[:, pixel]).all()
    pgd = PGD(explain, torch.nn.CrossEntropyLoss(reduction="none"), lower_bound=0, upper_bound=1)
    perturbed = pgd.perturb(
        inputs=images, radius=0.13, step_size=0.02, step_num=7, target=torch.full((3,), pixel), targeted=True
    )
    assert (perturbed - images).abs().max() <= 0.13 + 1e-6
    assert explain(perturbed)[:, pixel].gt(explain(images)[:, pixel]).all()

    def shifted(explained: Tensor, target: Tensor) -> bool:
        return bool(explained.argmax(dim=1) == target)

    least = MinParamPerturbation(explain, fgsm, "epsilon", arg_min=0.0, arg_max=1.0, arg_step=0.1, correct_fn=shifted)
    largest = explain(images[:1]).argmax(dim=1)
    found, epsilon = least.evaluate(images[:1], attack_kwargs={"target": largest}, target=largest)
    assert found is None or epsilon > 0


@pytest.mark.parametrize("algorithm", TWO)
def test_cifar_robustness_compares_attacks(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor) -> None:
    """The change of the map under blur and noise, on inputs that are normalized after the attack."""
    attribution = algorithm(net, net.features)
    normalized = images - 0.5
    expected = attribution.attribute(normalized, target=1)

    def similarity(explained: Tensor) -> Tensor:
        return nn.functional.cosine_similarity(explained.flatten(1), expected.flatten(1))

    comparator = AttackComparator(
        forward_func=lambda inputs: attribution.attribute(inputs, target=1),
        metric=similarity,
        preproc_fn=lambda inputs: inputs - 0.5,
    )
    comparator.add_attack(lambda inputs: inputs + 0.3 * torch.randn_like(inputs), "Noise", num_attempts=2)
    comparator.add_attack(nn.AvgPool2d(3, 1, 1), "Blur")
    results = comparator.evaluate(images)
    torch.testing.assert_close(results["Original"], torch.ones(3), atol=1e-4, rtol=0)
    assert results["Blur"]["mean"].lt(1 - 1e-4).any()


class Segmentation(nn.Module):
    """Returns a dictionary of (N, classes, H, W), as torchvision's models for segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU())
        self.classifier = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        scores = self.classifier(self.backbone(x))
        return {"out": nn.functional.interpolate(scores, x.shape[2:], mode="bilinear")}


def wrapped(model: Segmentation, image: Tensor) -> Any:
    """The score of a class is the sum of its logits over the pixels that are of the class in the image."""
    with torch.no_grad():
        classes = model(image)["out"].argmax(dim=1, keepdim=True)

    def forward(inputs: Tensor) -> Tensor:
        output = model(inputs)["out"]
        chosen = torch.zeros_like(output[:1]).scatter_(1, classes, 1)
        return (output * chosen).sum(dim=(2, 3))

    return forward


@pytest.mark.parametrize("algorithm", TWO)
def test_segmentation_interpret(algorithm: type[LayerAttribution], images: Tensor) -> None:
    model, image = Segmentation().eval(), images[:1]
    forward = wrapped(model, image)
    options = {"activation": None} if has_input_shape(algorithm) else {}
    attributions = algorithm(forward, model.backbone[0], **options).attribute(image, target=2)
    if not has_input_shape(algorithm):
        attributions = LayerAttribution.interpolate(attributions, image.shape[2:])
    assert attributions.shape[2:] == image.shape[2:]
    assert attributions.isfinite().all()
    assert attributions.any()


class Answers(nn.Module):
    """Answers a question, given as tokens and their number, on a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(4 + 6, 3)

    def forward(self, v: Tensor, q: Tensor, q_len: Tensor) -> Tensor:
        words = self.embedding(q).sum(dim=1) / q_len.view(-1, 1)
        return self.head(torch.cat([self.features(v).mean((2, 3)), words], dim=1))


@pytest.fixture
def question() -> tuple[Tensor, Tensor]:
    return torch.randint(11, (3, 5)), torch.tensor([5, 4, 5])


@pytest.mark.parametrize("algorithm", [*TWO, LayerGroupCam])
def test_multimodal_vqa_with_an_interpretable_embedding(
    algorithm: type[LayerAttribution], images: Tensor, question: tuple[Tensor, Tensor]
) -> None:
    """The question reaches the model as its embedding, a second input with a baseline; only the picture is masked."""
    model = Answers().eval()
    tokens, length = question
    straight = algorithm(lambda v: model(v, tokens[:1].expand(len(v), -1), length[:1].expand(len(v))), model.features)
    expected = straight.attribute(images[:1], target=1)
    embedding = configure_interpretable_embedding_layer(model, "embedding")
    try:
        words = embedding.indices_to_embeddings(tokens[:1])
        attribution = algorithm(model, model.features)
        options: dict[str, Any] = {}
        if takes(algorithm, "baselines") and "blur" not in (algorithm.__doc__ or ""):
            options["baselines"] = (images[:1] * 0, words * 0)
        ours = attribution.attribute(
            inputs=(images[:1], words), target=torch.tensor(1), additional_forward_args=length[:1], **options
        )
    finally:
        remove_interpretable_embedding_layer(model, embedding)
    if has_input_shape(algorithm):
        ours, of_words = ours
        assert of_words.shape == words.shape
        assert not of_words.any()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("algorithm", TWO)
def test_multimodal_vqa_with_wrapped_inputs(
    algorithm: type[LayerAttribution], images: Tensor, question: tuple[Tensor, Tensor]
) -> None:
    """Captum's wrapper of the inputs gives a layer for each; a list of layers is refused."""
    model = Answers().eval()
    tokens, length = question
    expected = algorithm(model, model.features).attribute((images, tokens), 1, length)
    wrapper = ModelInputWrapper(model)
    ours = algorithm(wrapper, model.features).attribute((images, tokens), 1, length)
    for one, other in zip(
        *((value if isinstance(value, tuple) else (value,)) for value in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)
    of_pixels = algorithm(wrapper, wrapper.input_maps["v"]).attribute((images, tokens), 1, length)
    picture = of_pixels[0] if isinstance(of_pixels, tuple) else of_pixels
    assert picture.shape[2:] == images.shape[2:]
    layers = [wrapper.input_maps["v"], model.embedding]
    with pytest.raises((TypeError, ValueError), match=r"layer is \[.*expected a torch.nn.Module"):
        algorithm(wrapper, layers).attribute((images, tokens), 1, length)
    if takes(algorithm, "baselines"):  # Its words have one axis, which is none of the picture's.
        with pytest.raises(ValueError, match="spatial_view"):
            algorithm(model, model.embedding).attribute((images, tokens), 1, length)


class Centres(Classifier):
    """The direction from the mean of one concept's activations to that of the other."""

    def __init__(self) -> None:
        self.direction: Tensor | None = None

    def train_and_eval(self, dataloader: Any, **_: Any) -> dict[str, Any]:
        inputs, labels = (torch.cat(values) for values in zip(*dataloader, strict=True))
        self.direction = inputs[labels == 1].mean(0) - inputs[labels == 0].mean(0)
        return {"accs": 1.0}

    def weights(self) -> Tensor:
        return torch.stack([-self.direction, self.direction])

    def classes(self) -> list[int]:
        return [0, 1]


def tcav(model: nn.Module, attribution: LayerAttribution, path: Path) -> tuple[TCAV, list[Concept]]:
    torch.manual_seed(1)
    concepts = [Concept(index, f"concept{index}", [torch.rand(4, 3, 12, 10) + index]) for index in (0, 1)]
    return (
        TCAV(model, ["stem", "features"], classifier=Centres(), layer_attr_method=attribution, save_path=str(path)),
        concepts,
    )


@pytest.mark.parametrize("algorithm", [LayerHiResCam, LayerScoreCam])
def test_tcav(algorithm: type[LayerAttribution], net: SmallNet, images: Tensor, tmp_path: Path) -> None:
    """Its directions have an entry for each channel and pixel: the map is not summed over the channels."""
    explainer, concepts = tcav(net, algorithm(net, None), tmp_path)
    scores = explainer.interpret(images, [concepts], target=1, attr_dim_summation=False)
    for layer in ("stem", "features"):
        plain = algorithm(net, net.get_submodule(layer)).attribute(images, 1, attr_dim_summation=False)
        direction = torch.as_tensor(explainer.cavs["0-1"][layer].stats["weights"])
        expected = (plain.flatten(1) @ direction.T > 0).float().mean(0)
        torch.testing.assert_close(scores["0-1"][layer]["sign_count"], expected)
    # Of the size of Captum's own, which the tutorial takes.
    assert plain.shape == LayerGradientXActivation(net, net.features).attribute(images, 1).shape


@pytest.mark.parametrize("algorithm", TWO)
def test_tcav_of_a_map_is_refused(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor, tmp_path: Path
) -> None:
    """A map has one channel, or the input's shape: Captum cannot multiply it by a direction among activations."""
    explainer, concepts = tcav(net, algorithm(net, None), tmp_path)
    with pytest.raises(RuntimeError, match=r"(?i)size|shape"):
        explainer.interpret(images, [concepts], target=1)
