"""The class activation maps that follow from gradients and activations."""

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam, LayerGradientXActivation, NoiseTunnel
from torch import Tensor, nn

from captum_fusion import (
    LayerEigenCam,
    LayerEigenGradCam,
    LayerFEM,
    LayerGradCamElementWise,
    LayerGradCamPlusPlus,
    LayerHiResCam,
    LayerKPCACam,
    LayerLayerCam,
    LayerSegEigenCam,
    LayerXGradCam,
)
from tests import straight_line
from tests.conftest import SmallNet

METHODS = [
    LayerGradCamPlusPlus,
    LayerXGradCam,
    LayerLayerCam,
    LayerHiResCam,
    LayerGradCamElementWise,
    LayerEigenCam,
    LayerEigenGradCam,
    LayerFEM,
    LayerSegEigenCam,
    LayerKPCACam,
]


def test_grad_cam_plus_plus_worked_out_by_hand() -> None:
    # The layer is the input, f = 2 (left of channel 0) - (right of channel 0) + (left of channel 1).
    # Channel 0: A = [1, 3], sum 4, g = [2, -1]: alpha = 4 / (8 + 4 * 8) = 1/10, weight 2/10.
    # Channel 1: A = [1, 1], sum 2, g = [1, 0]: alpha = 1 / (2 + 2) = 1/4, weight 1/4.
    x = torch.tensor([[[1.0, 3.0], [1.0, 1.0]]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        values = identity(inputs)
        return 2 * values[:, 0, 0] - values[:, 0, 1] + values[:, 1, 0]

    attributions = LayerGradCamPlusPlus(forward, identity).attribute(x)
    torch.testing.assert_close(attributions, torch.tensor([[[0.2 + 0.25, 0.6 + 0.25]]]))


def test_x_grad_cam_of_even_gradients_is_grad_cam(net: SmallNet, images: Tensor) -> None:
    # Global average pooling gives every pixel of a channel the same gradient.
    model = nn.Sequential(net.stem, net.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head)
    ours = LayerXGradCam(model, net.features).attribute(images, target=0)
    torch.testing.assert_close(ours, LayerGradCam(model, net.features).attribute(images, target=0))


def test_a_dead_layer_gives_zeros(net: SmallNet, images: Tensor) -> None:
    with torch.no_grad():
        net.features.weight.zero_()
        net.features.bias.zero_()
    for algorithm in METHODS:
        assert algorithm(net, net.features).attribute(images, target=0).eq(0).all(), algorithm


def test_layer_cam_hi_res_cam_and_element_wise_grad_cam_worked_out_by_hand() -> None:
    # The layer is the input, f = 2 a - b + c for channels [a, b] = [1, 3] and [c, d] = [-2, 5].
    x = torch.tensor([[[1.0, 3.0], [-2.0, 5.0]]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        values = identity(inputs)
        return 2 * values[:, 0, 0] - values[:, 0, 1] + values[:, 1, 0]

    for algorithm, expected in [
        (LayerLayerCam, [2.0 - 2.0, 0.0]),
        (LayerHiResCam, [2.0 - 2.0, -3.0]),
        (LayerGradCamElementWise, [2.0, 0.0]),
    ]:
        torch.testing.assert_close(algorithm(forward, identity).attribute(x), torch.tensor([[expected]]))


def test_fem_and_seg_eigen_cam_worked_out_by_hand() -> None:
    # The mean of five zeros and 6 is 1 and the standard deviation sqrt(5); 0.1 everywhere marks nothing. By gradients
    # of 2 and -2, B is [0, 0, 0, 0, 0, -12] about a mean of -2: its largest absolute value is that of the last pixel.
    x = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 0.0, -6.0], [0.1] * 6]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        return -2 * identity(inputs)[:, 0].sum(1)

    assert LayerFEM(forward, identity).attribute(-x).tolist() == [[[0, 0, 0, 0, 0, 1]]]
    expected = torch.tensor([[[-2.0, -2.0, -2.0, -2.0, -2.0, 10.0]]])
    torch.testing.assert_close(LayerSegEigenCam(forward, identity).attribute(x), expected)


def test_kpca_cam_worked_out_by_hand() -> None:
    # The centred pixels are -1, -1 and 2, the kernel's matrix tanh(1 * 1 + 1), tanh(-1 * 2 + 1) and tanh(2 * 2 + 1).
    # v = (-1, -1, 2) / sqrt(6), and the eigenvalue is (4 tanh(2) + 8 tanh(1) + 4 tanh(5)) / 6.
    component = np.sqrt((4 * np.tanh(2) + 8 * np.tanh(1) + 4 * np.tanh(5)) / 36)
    identity = nn.Identity()
    for x in (torch.tensor([[[1.0, 1.0, 4.0]]]), torch.tensor([[[1.0, 1.0, 4.0]]]).repeat(1, 2, 1)):
        attribution = LayerKPCACam(lambda inputs: identity(inputs).sum((1, 2)), identity)
        torch.testing.assert_close(attribution.attribute(x), component * torch.tensor([[[-1.0, -1.0, 2.0]]]))
        shares = attribution.attribute(x, attr_dim_summation=False)
        torch.testing.assert_close(shares.sum(dim=1), attribution.attribute(x)[:, 0])


def test_eigen_cams_worked_out_by_hand() -> None:
    # Channels [0, 2, 4] and [0, -1, -2] vary along (2, -1) / sqrt(5) alone; the centred pixels lie at -sqrt(5), 0 and
    # sqrt(5). f takes minus the second channel, so that g A is 0 and [0, 1, 2].
    x = torch.tensor([[[0.0, 2.0, 4.0], [0.0, -1.0, -2.0]]])
    identity = nn.Identity()

    def forward(inputs: Tensor) -> Tensor:
        return -identity(inputs)[:, 1].sum(dim=1)

    along = torch.tensor([[[-1.0, 0.0, 1.0]]])
    torch.testing.assert_close(LayerEigenCam(forward, identity).attribute(x), 5**0.5 * along)
    torch.testing.assert_close(LayerEigenGradCam(forward, identity).attribute(x), along)


@pytest.mark.parametrize("algorithm", [LayerEigenCam, LayerEigenGradCam])
def test_the_sign_of_a_component_does_not_depend_on_chance(
    algorithm: type[LayerAttribution], net: SmallNet, images: Tensor
) -> None:
    """Pixels in another order have the same covariance."""
    for inputs in (images, images.flip(2), images.flip(3)):
        maps = algorithm(net, net.features).attribute(inputs, target=0).flatten(1)
        if algorithm is LayerEigenCam:
            sums = net.features(net.stem(inputs)).sum(dim=1).flatten(1)
        else:
            sums = LayerHiResCam(net, net.features).attribute(inputs, target=0).flatten(1)
        assert ((maps - maps.mean(1, True)) * (sums - sums.mean(1, True))).sum(1).gt(0).all()


def test_a_component_of_channels_that_vary_alike_has_finite_gradients() -> None:
    """Constant pixels, and directions of the same variance, would make the derivative of a decomposition NaN."""
    x = torch.tensor([[[3.0, -3.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0, 0.0, 0.0], [0.0] * 4 + [1.0, -1.0]]])
    identity = nn.Identity()
    attributions = LayerEigenCam(lambda x: identity(x).sum((1, 2)), identity).attribute(x.requires_grad_())
    torch.testing.assert_close(attributions, x[:, :1])
    (gradient,) = torch.autograd.grad(attributions.square().sum(), x)
    assert gradient.isfinite().all()


def test_hi_res_cam_is_captums_gradient_x_activation_summed(net: SmallNet, images: Tensor) -> None:
    captums = LayerGradientXActivation(net, net.features).attribute(images, target=0)
    ours = LayerHiResCam(net, net.features)
    torch.testing.assert_close(ours.attribute(images, target=0), captums.sum(dim=1, keepdim=True))
    element_wise = LayerGradCamElementWise(net, net.features).attribute(images, target=0)
    torch.testing.assert_close(element_wise, captums.relu().sum(dim=1, keepdim=True))


def test_smooth_grad_cam_plus_plus_is_a_noise_tunnel_around_grad_cam_plus_plus(net: SmallNet, images: Tensor) -> None:
    seen: list[Tensor] = []
    hook = net.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    tunnel = NoiseTunnel(LayerGradCamPlusPlus(net, net.features))
    smoothed = tunnel.attribute(images[:1], nt_samples=4, stdevs=0.3, target=1)
    hook.remove()
    noisy = torch.cat(seen)
    assert len(noisy) == 4
    maps = []
    for x in noisy.split(1):
        activations, gradients = straight_line.activations_and_gradients(net, net.features, x, 1)
        maps.append(straight_line.grad_cam_plus_plus(activations, gradients))
    assert not np.allclose(maps[0], maps[1])
    np.testing.assert_allclose(smoothed[0, 0].detach(), sum(maps) / 4, atol=1e-5 * np.abs(maps).max())
