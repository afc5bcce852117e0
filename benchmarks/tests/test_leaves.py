"""The split of the leaves, and the training, saving and loading of their networks."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import leaves
from benchmarks.leaves import Network, Photograph, find, share, split, vgg
from captum_fusion.explain import Explainer


def photographs_of(count: int) -> tuple[list[Photograph], np.ndarray]:
    """Three photographs of each leaf of two diseases, and their similarities: 0.9 on one leaf, else less."""
    photographs = [
        Photograph(Path(f"{disease}_{number}.jpg"), disease, number, "train")
        for disease in ("blight", "spot")
        for number in range(3 * count)
    ]
    leaf = np.array([number // 3 for number in (*range(3 * count), *range(3 * count))])
    same = np.array([[one.disease == other.disease for other in photographs] for one in photographs])
    random = np.random.default_rng(0).uniform(-0.5, 0.6, same.shape)
    alike = np.where(leaf[:, None] == leaf, 0.9, np.minimum(random, random.T))
    return photographs, np.where(same, alike, -1)


@pytest.mark.parametrize("seed", [0, 1])
def test_leaves_are_kept_apart(seed: int) -> None:
    photographs, alike = photographs_of(count=30)
    _, parts = split(photographs, alike, seed)
    train, test = parts == "train", parts == "test"
    assert alike[train][:, test].max() <= 0.5
    by_leaf = parts.reshape(-1, 3) == "test"
    assert (by_leaf.all(1) == by_leaf.any(1)).all()
    assert 0 < test[:90].sum() <= 27
    assert 0 < test[90:].sum() <= 27
    assert train.any()


def test_consecutive_photographs_need_less_similarity_to_form_a_group() -> None:
    photographs = [Photograph(Path(f"spot_{number}.jpg"), "spot", number, "train") for number in (1, 2, 7)]
    alike = np.full((3, 3), 0.3)
    groups, _ = split(photographs, alike, seed=0)
    assert groups[0] == groups[1] != groups[2]


def test_rotated_copies_are_left_out(tmp_path: Path) -> None:
    for part, name in (("train", "Spot_2"), ("train", "Spot_rot90_2"), ("test", "Spot_1")):
        (tmp_path / part / "Spot").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "Spot" / f"{name}.jpg")
    assert [(photo.number, photo.published) for photo in find(tmp_path)] == [(1, "test"), (2, "train")]
    with pytest.raises(SystemExit, match="no photographs like"):
        find(tmp_path / "train")


def test_interval_of_a_share() -> None:
    # Wilson (1927): for 10 of 10 the lower bound is 10 / (10 + z^2).
    assert share(np.ones(10, dtype=bool))["interval"] == pytest.approx([10 / (10 + 1.959964**2), 1], abs=1e-4)


def test_the_command_loads_its_vgg(tmp_path: Path) -> None:
    trained = vgg().eval()
    torch.save(trained.state_dict(), tmp_path / "vgg.pt")
    opened = Explainer("benchmarks.leaves:vgg", weights=str(tmp_path / "vgg.pt")).open(Image.new("RGB", (300, 260)))
    probabilities = trained(opened.inputs).softmax(dim=1)[0]
    torch.testing.assert_close(opened.prediction.probabilities, probabilities.detach())


def test_an_interrupted_run_trains_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = tmp_path / "photographs", tmp_path / "output"
    for disease in ("Blast", "Smut", "Spot"):
        for number in range(4):
            part = folder / ("test" if number == 0 else "train") / disease
            part.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(part / f"{disease}_{number}.jpg")
    trained_on: list[int] = []

    def train(_: nn.Module, photographs: Sequence[Photograph]) -> None:
        if len(trained_on) == interrupted_at:
            raise KeyboardInterrupt
        trained_on.append(len(photographs))

    monkeypatch.setattr(leaves, "NETWORKS", {"vgg": Network("benchmarks.leaves:vgg", vgg, train)})
    monkeypatch.setattr(leaves, "TESTED", 2)
    # No photograph is similar to another: each is a group.
    monkeypatch.setattr(leaves, "similarity", lambda _: np.full((12, 12), -1.0))
    # The setting outlives the run.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    monkeypatch.setattr("sys.argv", ["leaves", str(folder), str(output)])
    interrupted_at = 1
    with pytest.raises(KeyboardInterrupt):
        leaves.main()
    weights = (output / "vgg.pt").read_bytes()
    interrupted_at = -1
    leaves.main()
    # With leaves apart, 6 photographs are for training; on the published split, 9.
    assert trained_on == [6, 9]
    assert (output / "vgg.pt").read_bytes() == weights
    record = json.loads((output / "vgg.json").read_text(encoding="utf-8"))
    assert [record[title]["photographs"]["of"] for title in ("leaves apart", "published split")] == [6, 3]
    monkeypatch.setattr("sys.argv", ["leaves", str(folder), str(output), "--seed", "1"])
    with pytest.raises(SystemExit, match="another split"):
        leaves.main()
