import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerActivation, LayerGradCam, NoiseTunnel, Occlusion, Saliency
from torch import Tensor, nn

from captum_fusion import AugmentationTunnel, FusedAttributions, LayerScoreCam
from tests.conftest import SmallNet
from tests.methods import KINDS

pytestmark = pytest.mark.every_device


def lopsided(x: Tensor) -> Tensor:
    """Explained by its gradient times the input, 2 x on the left and x^2-like on the right of two pixels."""
    return (2 * x[:, 0, 0] + x[:, 0, 1] ** 2).unsqueeze(1)


def test_worked_out_by_hand() -> None:
    # The gradient of 2 a + b^2 is (2, 2 b); of the mirror image, 2 b + a^2, it is (2 a, 2) when mirrored back.
    # At (a, b) = (1, 3) and factors of 1 and 2: the mean of (2, 6), (2, 12), (2, 2) and (4, 2).
    x = torch.tensor([[[1.0, 3.0]]])
    smooth = AugmentationTunnel(Saliency(lopsided))
    ours = smooth.attribute(x, factors=[1, 2], target=0, abs=False)
    torch.testing.assert_close(ours, torch.tensor([[[2.5, 5.5]]]))
    without = smooth.attribute(x, flip=False, factors=[1, 2], target=0, abs=False)
    torch.testing.assert_close(without, torch.tensor([[[2.0, 9.0]]]))


def test_a_map_of_the_mirror_image_is_the_mirror_image_of_the_map() -> None:
    for axes in [1, 2, 3]:
        model = SmallNet(axes).eval()
        images = torch.randn(2, 3, *(9, 6, 8)[:axes])
        smooth = AugmentationTunnel(LayerGradCam(model, model.features))
        ours = smooth.attribute(images, target=1)
        torch.testing.assert_close(smooth.attribute(images.flip(-1), target=1).flip(-1), ours)
        assert not torch.allclose(ours, LayerGradCam(model, model.features).attribute(images, target=1))


def test_around_a_method_of_each_kind(net: SmallNet, images: Tensor) -> None:
    for algorithm in KINDS:
        method = algorithm(net, net.features)
        plain = method.attribute(images, target=1)
        still = AugmentationTunnel(method).attribute(images, flip=False, factors=[1.0], target=1)
        torch.testing.assert_close(still, plain)
        assert AugmentationTunnel(method).attribute(images, factors=[1.0], target=1).shape == plain.shape


def test_around_captums_methods_and_tunnels(net: SmallNet, images: Tensor) -> None:
    for method, options in [
        (IntegratedGradients(net), {"n_steps": 2}),
        (Occlusion(net), {"sliding_window_shapes": (3, 4, 4)}),
        (NoiseTunnel(Saliency(net)), {"nt_samples": 2}),
    ]:
        assert AugmentationTunnel(method).attribute(images, target=1, **options).shape == images.shape
    smooth = AugmentationTunnel(Saliency(net))
    noisy = NoiseTunnel(smooth).attribute(images, nt_samples=2, stdevs=0.0, target=1)
    torch.testing.assert_close(noisy, smooth.attribute(images, target=1))


def test_baselines_are_mirrored_with_the_input(net: SmallNet, images: Tensor) -> None:
    baselines = torch.rand_like(images)
    score_cam = LayerScoreCam(net, net.features)
    ours = AugmentationTunnel(score_cam).attribute(images, factors=[1.0], baselines=baselines, target=1)
    mirrored = score_cam.attribute(images.flip(-1), baselines=baselines.flip(-1), target=1).flip(-1)
    expected = (score_cam.attribute(images, baselines=baselines, target=1) + mirrored) / 2
    torch.testing.assert_close(ours, expected)


def test_several_inputs(net: SmallNet, images: Tensor) -> None:
    """A table and integers are given as they are."""
    table = torch.rand(3, 3, device=images.device)

    def forward(x: Tensor, table: Tensor) -> Tensor:
        return net(x) * table

    smooth = AugmentationTunnel(Saliency(forward))
    attributions = smooth.attribute((images, table), target=1, factors=[1.0])
    assert [value.shape for value in attributions] == [images.shape, table.shape]
    layer_map = AugmentationTunnel(LayerGradCam(forward, net.features)).attribute((images, table), target=1)
    assert layer_map.shape == (3, 1, 6, 5)


def test_pytorch_grad_cams_aug_smooth_is_the_same() -> None:
    """It normalizes the map of each flip and each factor, as a fusion of one attribution does."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from tests.cases import TARGETS, case

    model, layer, images, _, _ = case("resnet")
    smooth = AugmentationTunnel(FusedAttributions([LayerGradCam(model, layer)]))
    ours = smooth.attribute(images, target=TARGETS)
    with pytorch_grad_cam.GradCAM(model, [layer]) as cam:
        theirs = cam(images, [ClassifierOutputTarget(target) for target in TARGETS], aug_smooth=True)
    for example in range(len(images)):
        assert np.corrcoef(ours[example, 0].numpy().ravel(), theirs[example].ravel())[0, 1] > 0.999


def test_properties(net: SmallNet) -> None:
    smooth = AugmentationTunnel(LayerScoreCam(net, net.features))
    assert smooth.get_name() == "Augmentation Tunnel"
    assert smooth.forward_func is net
    assert smooth.multiplies_by_inputs
    assert not AugmentationTunnel(Saliency(net)).multiplies_by_inputs
    assert not smooth.has_convergence_delta()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.patches(x).flatten(2).mT).mean(1))


def test_refuses(net: SmallNet, images: Tensor) -> None:
    with pytest.raises(TypeError, match="attribution_method is 'saliency'; expected an instance"):
        AugmentationTunnel("saliency")
    with pytest.raises(ValueError, match="factors is empty"):
        AugmentationTunnel(Saliency(net)).attribute(images, factors=[], target=1)
    tokens = Tokens().to(images.device)
    with pytest.raises(ValueError, match="expected attributions with as many axes as the spatial inputs"):
        AugmentationTunnel(LayerActivation(tokens, tokens.norm)).attribute(images)
    with_delta = AugmentationTunnel(IntegratedGradients(net))
    with pytest.raises(ValueError, match="expected attributions with as many axes"):
        with_delta.attribute(images, target=1, n_steps=2, return_convergence_delta=True)
