"""More than a class index: each case with a real model, by a gradient method, a masked one and the fusion."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.models.video import r3d_18

from captum_fusion import LayerFusionCam, LayerGroupCam, LayerScoreCam, last_feature_map
from captum_fusion.targets import box_score, mirrored, region_scores


def explained(
    forward_func: Callable[..., Tensor], layer: nn.Module, inputs: Tensor, target: Any, activation: Any = "softmax"
) -> Tensor:
    """The map of Fusion-CAM, with Group-CAM as the region method, which costs few passes."""
    region = LayerGroupCam(forward_func, layer, activation=activation)
    fusion_cam = LayerFusionCam(forward_func, layer, activation=activation, region_method=region)
    attributions = fusion_cam.attribute(inputs, target)
    assert attributions.shape == inputs.shape
    assert attributions.isfinite().all()
    assert LayerGradCam(forward_func, layer).attribute(inputs, target).any()
    return attributions


def test_a_region_of_a_segmentation() -> None:
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    image = torch.rand(1, 3, 64, 96)
    region = torch.zeros(64, 96, dtype=torch.bool)
    region[8:24, 8:40] = True
    forward = region_scores(model, region)
    torch.testing.assert_close(forward(image)[0], model(image)["out"][0][:, 8:24, 8:40].mean((1, 2)))
    feature_map = last_feature_map(model, image, forward)
    assert feature_map.shape[1:] != (64, 96)
    with feature_map.view() as layer:
        assert explained(forward, layer, image, 5).any()


def test_a_region_of_a_smaller_segmentation() -> None:
    sizes = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1], "depths": [1, 1, 1, 1]}
    config = transformers.SegformerConfig(num_labels=4, decoder_hidden_size=8, **sizes)
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    image = torch.rand(1, 3, 64, 64)
    everywhere = region_scores(model, torch.ones(64, 64))
    # Bilinear interpolation to a multiple of the size keeps the mean, but for what the border repeats.
    torch.testing.assert_close(everywhere(image), model(image).logits.mean((2, 3)), atol=0.02, rtol=0.1)
    layer = model.get_submodule("decode_head.linear_fuse")
    assert explained(everywhere, layer, image, 2).any()


def test_a_region_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="The region is empty"):
        region_scores(nn.Identity(), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"returned \(1, 3\) for a region of shape \(4, 4\); expected scores of each"):
        region_scores(nn.Flatten(), torch.ones(4, 4))(torch.rand(1, 3))
    with pytest.raises(ValueError, match=r"such as region\[0\]"):
        region_scores(nn.Identity(), torch.ones(1, 4, 4))(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"or captum_fusion\.targets\.region_scores for scores of"):
        LayerScoreCam(nn.Sequential(layer := nn.Conv2d(3, 2, 1)), layer).attribute(torch.rand(1, 3, 4, 4), target=1)


@pytest.fixture
def detector() -> nn.Module:
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=96, max_size=96, box_score_thresh=0.0, rpn_post_nms_top_n_test=20
    )
    return model.eval()


def test_a_box_of_a_detector(detector: nn.Module) -> None:
    image = torch.rand(1, 3, 96, 96)
    (found,) = detector(image)
    box, label, score = found["boxes"][0].detach(), int(found["labels"][0]), found["scores"][0]
    forward = box_score(detector, box, label)
    # The box overlaps itself wholly, and is the best of its label.
    torch.testing.assert_close(forward(image), score[None])
    assert forward(image) <= 1
    layer = detector.backbone.body["16"]
    explained(forward, layer, image, None, activation=None)


def test_boxes_worked_out_by_hand() -> None:
    found = {
        "boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 2.0, 2.0]]),
        "labels": torch.tensor([1, 1, 2]),
        "scores": torch.tensor([0.3, 0.9, 1.0]),
    }
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    forward = box_score(lambda _: [found, none], [0, 0, 2, 2], label=1)
    # 0.3 of all of the box, 0.9 of half of it, and another label.
    torch.testing.assert_close(forward(torch.rand(2, 3, 4, 4)), torch.tensor([0.45, 0.0]))
    with pytest.raises(ValueError, match="expected x1 < x2 and y1 < y2"):
        box_score(nn.Identity(), [2, 0, 2, 2], 1)
    # In shares of the sides, of an image of 8 pixels, for a detector of pixels and for one of shares.
    for unit in (8, 1):
        boxes = unit * torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.25, 0.75, 0.5]])
        sides = [{"boxes": boxes, "labels": torch.ones(2), "scores": torch.tensor([0.6, 0.4])}]
        forward = box_score(lambda _, sides=sides: sides, [0.25, 0.25, 0.5, 0.5], 1)
        if unit == 8:
            with pytest.raises(ValueError, match="in shares of the image's sides, and the detector's boxes are in pix"):
                forward(torch.rand(1, 3, 8, 8))
            continue
        torch.testing.assert_close(forward(torch.rand(1, 3, 8, 8)), torch.tensor([0.6]))
        with mirrored():
            torch.testing.assert_close(forward(torch.rand(1, 3, 8, 8)), torch.tensor([0.4]))
    # The losses of a detector in training mode, and YOLO's tensors.
    for output in ({"loss": 1}, (torch.rand(1, 84, 10), [])):
        with pytest.raises(TypeError, match=r"forward_func returned (dict|tuple); expected a list .* call model\.eval"):
            box_score(lambda _, output=output: output, [0, 0, 2, 2], 1)(torch.rand(1, 3, 4, 4))


def test_one_query_of_a_detection_transformer() -> None:
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 4}
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, use_pretrained_backbone=False, **sizes
    )
    model = transformers.DetrForObjectDetection(config).eval()
    image = torch.rand(1, 3, 64, 96)

    def forward(x: Tensor) -> Tensor:
        return model(x).logits[:, 2]

    feature_map = last_feature_map(model, image, forward)
    with feature_map.view() as layer:
        assert explained(forward, layer, image, 1).any()


def test_the_similarity_of_an_image_and_a_text() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **sizes},
        vision_config={"image_size": 64, "patch_size": 16, **sizes},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    texts = torch.tensor([[0, 5, 7, 1], [0, 9, 3, 1], [0, 4, 4, 1]])
    image = torch.rand(1, 3, 64, 64)

    def forward(x: Tensor) -> Tensor:
        """The similarity of each image to each text, (N, texts)."""
        return model(pixel_values=x, input_ids=texts).logits_per_image

    feature_map = last_feature_map(model, image, forward)
    # The normalization before the last attention of the vision model.
    assert feature_map.name == "vision_model.encoder.layers.1.layer_norm1"
    assert feature_map.shape == (16, 4, 4)
    with feature_map.view() as layer:
        assert explained(forward, layer, image, 1).any()


@pytest.mark.parametrize("labels", [1, 4])
def test_a_binary_and_a_multi_label_classifier(labels: int) -> None:
    model = resnet18(weights=None, num_classes=labels).eval()
    image = torch.rand(1, 3, 64, 64)
    assert explained(model, model.layer4, image, labels - 1, activation="sigmoid").any()


def test_a_video_and_a_volume() -> None:
    video = r3d_18(weights=None, num_classes=3).eval()
    clip = torch.rand(1, 3, 4, 32, 32)
    with last_feature_map(video, clip).view() as layer:
        assert explained(video, layer, clip, 1).any()
    volume = nn.Sequential(nn.Conv3d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2))
    scan = torch.rand(1, 1, 16, 16, 16)
    feature_map = last_feature_map(volume, scan)
    assert (feature_map.name, feature_map.shape) == ("1", (8, 8, 8, 8))
    with feature_map.view() as layer:
        assert explained(volume, layer, scan, 1).any()
