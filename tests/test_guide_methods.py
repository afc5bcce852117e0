"""The table in docs/guide/methods.md says of every method what it does."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import captum_fusion
from captum_fusion import attr
from tests.conftest import Counter

TABLE = Path(__file__).parents[1].joinpath("docs/guide/methods.md").read_text(encoding="utf-8")
ROWS = {name: cells.split(" | ") for name, cells in re.findall(r"^\| `(\w+)` \| (.*) \|$", TABLE, re.MULTILINE)}
CHANNELS = 40


def test_every_method_has_a_row() -> None:
    assert sorted(ROWS) == sorted(["LayerGradCam", *(method.__name__ for method in attr.METHODS)])


def test_every_row_is_true() -> None:
    for name in (method.__name__ for method in attr.METHODS):
        _, gradients, passes, baseline, resolution, compares = ROWS[name]
        convolution = nn.Conv2d(3, CHANNELS, 3, stride=4, padding=1)
        model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(CHANNELS * 4, 4)).eval()
        image = torch.rand(1, 3, 8, 8)
        counter = Counter(model)
        arguments = {"Rise": {}, "FullGrad": {"model": model}, "WinsorCam": {"layers": [convolution]}}.get(
            name, {"layer": convolution}
        )
        method = getattr(captum_fusion, name)(counter, **arguments)
        attributions = method.attribute(image, target=1)
        at_most, factor, further = re.fullmatch(r"(at most )?(?:(\d*) ?C \+ )?(\d+)", passes).groups()  # type: ignore[union-attr]
        said = (0 if factor is None else int(factor or 1) * CHANNELS) + int(further)
        assert counter.rows <= said if at_most else counter.rows == said, name
        assert attributions.shape[2:] == {"layer": (2, 2), "input": (8, 8)}[resolution], name
        assert ("baselines" in inspect.signature(method.attribute).parameters) == baseline.startswith("yes"), name
        assert (getattr(method, "activation", None) == "softmax") == (compares == "probability"), name
        with torch.inference_mode():
            if gradients == "yes":
                with pytest.raises(RuntimeError, match=f"{name} needs gradients.*inference_mode.*no_grad"):
                    method.attribute(image, target=1)
            else:
                assert torch.equal(method.attribute(image, target=1), attributions), name
