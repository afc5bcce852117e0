"""Panels, as values for the page's scripts."""

import json
from base64 import b64decode
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captum_fusion.explain import ClassifiedImage, Explainer
from captum_fusion.page import _panels as views
from tests.conftest import SmallNet


@pytest.fixture
def picture(net: SmallNet) -> ClassifiedImage:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Explainer(net, size=24).open(Image.fromarray(pixels))


def values_of(panel: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(b64decode(panel["values"]), dtype="<u2").reshape(24, 24) / 65535


def test_maps_are_there_to_four_digits_and_what_is_missing_is_pending(picture: ClassifiedImage) -> None:
    made = {1: picture.explain(1, ["grad-cam"])}
    view = json.loads(views.maps(7, picture.prediction, [1, 2], made, ["grad-cam", "score-cam"]))
    assert [[panel["kind"] for panel in row["panels"]] for row in view["rows"]] == [
        ["heat", "pending"],
        ["pending", "pending"],
    ]
    assert view["begun"] == 7
    shown = view["rows"][0]["panels"][0]
    np.testing.assert_allclose(values_of(shown), made[1].maps["grad-cam"][0, 0].numpy(), atol=1e-5)
    assert shown["note"] == f"keeps P = {made[1].masked_probabilities['grad-cam']:.3f}"
    photograph = Image.open(BytesIO(b64decode(view["photograph"].partition(",")[2])))
    np.testing.assert_array_equal(
        np.asarray(photograph) / np.float32(255), picture.prediction.pixels[0].permute(1, 2, 0).numpy()
    )


def test_stages_and_agreement_are_those_of_the_fusions(picture: ClassifiedImage) -> None:
    explanation = picture.explain(1, ["x-grad-cam", "fusion(x-grad-cam,group-cam)"])
    stage = explanation.stages["fusion(x-grad-cam,group-cam)"]
    (row,) = json.loads(views.stages([explanation]))["rows"]
    shown = dict(zip(("gradient", "denoised", "region", "combined", "fused"), row["panels"], strict=True))
    for name, panel in shown.items():
        np.testing.assert_allclose(values_of(panel), getattr(stage, name)[0, 0].numpy(), atol=1e-5)
    assert shown["gradient"]["name"] == "G: x-grad-cam"
    assert shown["region"]["note"] == f"contributes {stage.region_contribution.item():+.3f}"
    (row,) = json.loads(views.agreement([explanation]))["rows"]
    both = row["panels"][-1]
    assert (both["first"], both["second"]) == (shown["denoised"]["values"], shown["region"]["values"])
    assert json.loads(views.stages([picture.explain(1, ["grad-cam"])]))["rows"] == []


def test_an_empty_map_says_so(picture: ClassifiedImage) -> None:
    explanation = picture.explain(1, ["grad-cam"])
    explanation.maps["grad-cam"] = torch.zeros(1, 1, 24, 24)
    (row,) = json.loads(views.maps(7, explanation, [1], {1: explanation}, ["grad-cam"]))["rows"]
    assert row["panels"][0]["note"] == "empty: no positive evidence for the class"


def test_the_five_most_probable_classes_and_those_chosen_beside_them(photograph_of_ten: ClassifiedImage) -> None:
    prediction = photograph_of_ten.prediction
    order = prediction.probabilities.argsort(descending=True).tolist()
    shown = json.loads(views.bars(prediction, [order[0], order[8]]))["classes"]
    assert [each["index"] for each in shown] == [*order[:5], order[8]]
    assert [each["chosen"] for each in shown] == [True, False, False, False, False, True]
    assert shown[5]["probability"] == pytest.approx(prediction.probabilities[order[8]].item())


@pytest.fixture
def photograph_of_ten() -> ClassifiedImage:
    return Explainer(SmallNet(classes=10), size=24).open(Image.new("RGB", (30, 40), "teal"))


def test_classes_of_the_same_name_are_told_apart(picture: ClassifiedImage) -> None:
    prediction = picture.prediction
    object.__setattr__(prediction, "categories", ("crane", "maillot", "crane"))
    assert views.labelled(prediction) == [("crane (0)", 0), ("maillot", 1), ("crane (2)", 2)]
