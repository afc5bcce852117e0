"""LeGrad: probabilities that are tensors of their own, and torchcam's."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torchvision.models import VisionTransformer

from captum_fusion import LayerLeGrad, spatial_view
from tests import straight_line
from tests.conftest import SmallNet

Head = Callable[[Tensor], Tensor]


@pytest.fixture
def vit() -> VisionTransformer:
    model = VisionTransformer(16, 4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def mean_head(model: VisionTransformer) -> Head:
    return lambda tokens: model.heads(model.encoder.ln(tokens.mean(dim=1)))


def first_head(model: VisionTransformer) -> Head:
    return lambda tokens: model.heads(model.encoder.ln(tokens[:, 0]))


def test_equals_the_straight_line_computation(vit: VisionTransformer) -> None:
    for head in (mean_head, first_head):
        images, targets = torch.randn(2, 3, 16, 16), [4, 1]
        blocks = list(vit.encoder.layers)
        expected = np.empty((3, 2, 17))
        for example, target in enumerate(targets):
            tokens = vit._process_input(images[example : example + 1])
            tokens = torch.cat([vit.class_token, tokens], dim=1) + vit.encoder.pos_embedding
            for index, block in enumerate(blocks):
                expected[index, example], tokens = straight_line.le_grad(block, head(vit), tokens, target)
        for frozen in (False, True):
            vit.requires_grad_(not frozen)
            for chosen in ([0], [2], [0, 1, 2]):
                layers: Any = [blocks[index] for index in chosen] if chosen[1:] else blocks[chosen[0]]
                with torch.no_grad():
                    ours = LayerLeGrad(vit, layers, head=head(vit)).attribute(images, targets)
                assert ours.shape == (2, 1, 4, 4)
                mean = expected[chosen].mean(axis=0)[:, 1:].reshape(2, 1, 4, 4)
                np.testing.assert_allclose(ours, mean, atol=1e-5 * mean.max())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torchcam needs Python 3.11")
def test_torchcam_agrees(vit: VisionTransformer) -> None:
    from torchcam.methods import LeGrad

    images, blocks = torch.randn(2, 3, 16, 16), list(vit.encoder.layers)
    ours = LayerLeGrad(vit, blocks, head=mean_head(vit)).attribute(images, target=3)
    with LeGrad(vit, blocks) as extractor:
        (theirs,) = extractor(3, vit(images), normalized=False)
    torch.testing.assert_close(ours[:, 0], theirs)


def of_timm() -> tuple[nn.Module, nn.Module, nn.Module, Head, Callable[[Any], Tensor]]:
    """A network, its block, the module whose output holds the probabilities, and its classifier."""
    model = timm.create_model("test_vit", num_classes=5).eval()
    block = model.blocks[-1]
    return model, block, block.attn.attn_drop, lambda tokens: model.forward_head(model.norm(tokens)), lambda a: a


def of_hugging_face() -> tuple[nn.Module, nn.Module, nn.Module, Head, Callable[[Any], Tensor]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=160, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    block = [part for part in model.modules() if type(part).__name__ == "ViTLayer"][-1]
    norm, classifier = model.vit.layernorm, model.classifier
    return model, block, block.attention, lambda tokens: classifier(norm(tokens)[:, 0]), lambda output: output[1]


def unfuse(model: nn.Module, block: Any) -> None:
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    else:
        block.attn.fused_attn = False


def check_fused_attention(
    model: nn.Module, block: nn.Module, attention: nn.Module, head: Head, probabilities_of: Callable[[Any], Tensor]
) -> None:
    def forward(x: Tensor) -> Tensor:
        output = model(x)
        return output if isinstance(output, Tensor) else output.logits

    images = torch.randn(2, 3, 160, 160)
    le_grad = LayerLeGrad(forward, block, head=head)
    ours = le_grad.attribute(images, target=3)
    unfuse(model, block)
    probabilities: list[Tensor] = []
    hook = attention.register_forward_hook(lambda _, __, output: probabilities.append(probabilities_of(output)))
    (gradients,) = torch.autograd.grad(forward(images)[:, 3].sum(), probabilities)
    hook.remove()
    expected = gradients.relu().mean(dim=(1, 2))[:, 1:].reshape(2, 1, 10, 10)
    torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match=r"0 attentions ran in 1 runs of the .*; expected one, by .*'sdpa'"):
        le_grad.attribute(images, target=3)


def test_fused_attention_has_the_gradients_of_the_unfused_one() -> None:
    for make in (of_timm, of_hugging_face):
        check_fused_attention(*make())


def test_the_model_is_left_as_it_was(vit: VisionTransformer) -> None:
    images = torch.randn(1, 3, 16, 16)
    expected = vit(images)
    le_grad = LayerLeGrad(vit, vit.encoder.layers[1], head=mean_head(vit))
    for target in (1, 9):
        if target == 9:
            with pytest.raises(ValueError, match="target 9 does not fit an output of shape"):
                le_grad.attribute(images, target=9)
        else:
            le_grad.attribute(images, target=target)
        assert _get_current_function_mode() is None
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in vit.modules())
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert torch.equal(vit(images), expected)


def test_refuses(vit: VisionTransformer) -> None:
    images, head = torch.randn(1, 3, 16, 16), mean_head(vit)
    with pytest.raises(ValueError, match="0 attentions ran in 1 runs of the LayerNorm"):
        LayerLeGrad(vit, vit.encoder.layers[0].ln_1, head=head).attribute(images, target=1)
    with pytest.raises(ValueError, match="3 attentions ran in 1 runs of the Encoder"):
        LayerLeGrad(vit, vit.encoder, head=head).attribute(images, target=1)
    with pytest.raises(TypeError, match="layer is an empty list"):
        LayerLeGrad(vit, [], head=head).attribute(images, target=1)
    net = SmallNet().eval()
    with pytest.raises(ValueError, match="already is a channels-first map"):
        LayerLeGrad(net, net.features, head=net.head).attribute(torch.rand(1, 3, 12, 10), target=1)
    with (
        spatial_view(vit.encoder.layers[0]) as view,
        pytest.raises(ValueError, match=r"0 attentions|already"),
    ):
        LayerLeGrad(vit, view, head=head).attribute(images, target=1)
    attention: Any = vit.encoder.layers[0].self_attention
    attention.add_zero_attn = True
    with pytest.raises(ValueError, match="adds keys that are no tokens"):
        LayerLeGrad(vit, vit.encoder.layers[0], head=head).attribute(images, target=1)
