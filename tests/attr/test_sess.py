"""SESS: the straight-line computation, batches, and what has no windows."""

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, LayerGradCam, NoiseTunnel, Saliency
from torch import Tensor, nn

from captum_fusion import SESS, LayerScoreCam
from captum_fusion.targets import box_score, region_scores
from tests import straight_line
from tests.conftest import Counter, SmallNet

pytestmark = pytest.mark.every_device

SCALES = [1, 1.5, 2.2]


def test_equals_the_straight_line_computation() -> None:
    model = SmallNet().eval()
    images, targets = 2 * torch.randn(2, 3, 12, 10), [0, 2]
    sizes = [(round(scale * 12), round(scale * 10)) for scale in SCALES]
    sess = SESS(LayerGradCam(model, model.features))
    # Of 1 + 4 + 9 windows.
    for pre_filter, left_out in ((0.0, 0), (0.5, 7)):
        attributions = sess.attribute(images, targets, scales=SCALES, pre_filter=pre_filter)
        assert attributions.shape == images.shape
        for x, target, attribution in zip(images.split(1), targets, attributions, strict=True):
            expected = straight_line.sess(model, model.features, x, target, sizes, left_out)
            expected = straight_line.blur(torch.from_numpy(expected)[None, None], 11, 5.0)[0, 0].numpy()
            for channel in attribution:
                np.testing.assert_allclose(channel, expected, atol=1e-5)


def test_pytorch_grad_cam_agrees() -> None:
    from pytorch_grad_cam import sess as peer
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = SmallNet().eval(), torch.randn(2, 3, 28, 28)
    model.relu = torch.nn.ReLU()  # Its hooks do not survive in-place layers.
    ours = SESS(LayerGradCam(model, model.features)).attribute(images, target=1, scales=[1, 9 / 7, 15 / 7])
    theirs = peer.SESS(model, [model.features], scales=[28, 36, 60])(images, [ClassifierOutputTarget(1)] * 2)
    for example in range(2):
        assert np.corrcoef(ours[example, 0].ravel(), theirs[example].ravel())[0, 1] > 0.999


def test_a_batch_equals_one_by_one_and_windows_may_be_smaller() -> None:
    for axes in (1, 3):
        model = SmallNet(axes).eval()
        images, scale = torch.randn(3, 3, *(12, 10, 8)[:axes]), torch.tensor([1.0, 2.0, 3.0])
        sess = SESS(LayerGradCam(lambda x, scale, model=model: model(x) * scale[:, None], model.features))
        options: dict[str, Any] = {"scales": [1, 1.3], "window": (8, 7, 8)[:axes], "pre_filter": 0.4}
        together = sess.attribute(images, [2, 0, 1], scale, **options)
        for example, target in enumerate([2, 0, 1]):
            one = slice(example, example + 1)
            alone = sess.attribute(images[one], target, scale[one], **options)
            torch.testing.assert_close(alone, together[one])


def test_around_methods_of_each_kind(net: SmallNet, images: Tensor) -> None:
    before = images.clone()
    for method, options in [
        (IntegratedGradients(net), {"n_steps": 2, "baselines": 0.5}),
        (NoiseTunnel(Saliency(net)), {"nt_samples": 2}),
        (LayerScoreCam(net, net.features), {}),
    ]:
        attributions = SESS(method).attribute(images.requires_grad_(), target=1, scales=[1, 1.5], **options)
        assert attributions.shape == images.shape
        assert not attributions.requires_grad
        assert attributions.ge(0).all()
        assert attributions.le(1).all()
    assert torch.equal(images, before)
    # Of the default scales, 122 windows: a pass for the score of each, and one for its map.
    counter = Counter(net)
    SESS(Saliency(counter)).attribute(before[:1, :, :7, :7], target=1)
    assert counter.rows == 2 * 122


def test_refuses(net: SmallNet, images: Tensor) -> None:
    method: Any = net
    with pytest.raises(TypeError, match=r"expected an instance of captum\.attr\.Attribution"):
        SESS(method)
    sess = SESS(LayerScoreCam(net, net.features))
    both: Any = (images, images)
    for inputs, error, options, message in [
        (both, TypeError, {}, "inputs are tuple; expected one tensor"),
        ((255 * images).long(), TypeError, {}, "inputs are torch.int64; expected"),
        (images, ValueError, {"scales": []}, "scales is empty"),
        (images, ValueError, {"scales": [0.5]}, r"window is \(12, 10\) for an input enlarged to \(6, 5\)"),
        (images, ValueError, {"window": (3,)}, r"window is \(3,\) for an input enlarged to \(12, 10\)"),
        (images, ValueError, {"pre_filter": 1}, "pre_filter is 1; expected a number in"),
        (images, ValueError, {"baselines": images}, r"baselines is a tensor \(3, 3, 12, 10\), which has no windows"),
        (images, ValueError, {"baselines": (images,)}, r"baselines holds a tensor \(3, 3, 12, 10\), which has no"),
        (images, ValueError, {"target": 3}, "target 3 does not fit an output"),
    ]:
        with pytest.raises(error, match=message):
            sess.attribute(inputs, **{"target": 1, "scales": [1], **options})
    with pytest.raises(ValueError, match=r"lowest score .* expected probabilities"):
        SESS(Saliency(lambda x: net(x).log_softmax(1)), activation=None).attribute(images, target=1, scales=[1])


def test_what_belongs_to_places_in_the_input_is_refused_unless_windows_are_all_of_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    x, mask = torch.rand(2, 3, 8, 10), torch.rand(2, 1, 8, 10)

    def masked(x: Tensor, mask: Any, *_: Any) -> Tensor:
        return net(x * (mask["mask"] if isinstance(mask, dict) else mask)).mean((2, 3))

    def detector(images: Tensor) -> list[dict[str, Tensor]]:
        scores = net(images).mean((1, 2, 3)).sigmoid()
        return [
            {"boxes": torch.tensor([[0.0, 0, 4, 4]]), "labels": torch.tensor([1]), "scores": s[None]} for s in scores
        ]

    of_mask, of_pixel = SESS(Saliency(masked)), SESS(Saliency(net), activation=None)
    for sess, options, message in [
        (of_mask, {"additional_forward_args": mask}, r"hold a tensor \(2, 1, 8, 10\), which has the size of the input"),
        (of_mask, {"additional_forward_args": (mask[:, 0],)}, "which has the size of the input"),
        (of_mask, {"additional_forward_args": {"mask": mask[:1]}}, "which has the size of the input"),
        (of_pixel, {"target": [(1, 2, 3), (2, 7, 9)]}, r"target is \(1, 2, 3\), a pixel of the whole input"),
        (SESS(Saliency(region_scores(net, mask[0, 0]))), {}, "The region is a place in the whole input"),
        (SESS(Saliency(box_score(detector, [0, 0, 4, 4], 1)), None), {"target": None}, "The box is a place in the"),
    ]:
        for scales, window in (([1.5], None), ([1], (4, 10)), ([2], (16, 20))):
            with pytest.raises(ValueError, match=message):
                sess.attribute(x, **{"target": 1, "scales": scales, "window": window, **options})
    of_pixel = SESS(Saliency(lambda x: net(x).sigmoid()), activation=None)
    table = (torch.rand(2, 1, 1, 1), torch.rand(2, 5, 7), torch.rand(2))
    for sess, options in [
        (of_mask, {"additional_forward_args": mask}),
        (of_mask, {"additional_forward_args": table, "scales": [1, 1.5]}),
        (of_pixel, {"target": (1, 2, 3)}),
        (SESS(Saliency(lambda x: net(x).flatten(2).sigmoid()), activation=None), {"target": (1, 5), "scales": [1.5]}),
        (SESS(Saliency(region_scores(net, mask[0, 0]))), {}),
    ]:
        assert sess.attribute(x, **{"target": 1, "scales": [1], **options}).any()
