"""The split of benchmarks/leaves.py, and that its own network is loaded as the command loads it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.leaves import Photograph, find, share, split, vgg
from captum_fusion._models import load_classifier


def photographs_of(leaves: int) -> tuple[list[Photograph], np.ndarray]:
    """Three photographs of each leaf of two diseases, and how alike they are: 0.9 for those of one leaf, else less."""
    photographs = [
        Photograph(Path(f"{disease}_{number}.jpg"), disease, number, "train")
        for disease in ("blight", "spot")
        for number in range(3 * leaves)
    ]
    leaf = np.array([number // 3 for number in (*range(3 * leaves), *range(3 * leaves))])
    same = np.array([[one.disease == other.disease for other in photographs] for one in photographs])
    random = np.random.default_rng(0).uniform(-0.5, 0.6, same.shape)
    alike = np.where(leaf[:, None] == leaf, 0.9, np.minimum(random, random.T))
    return photographs, np.where(same, alike, -1)


@pytest.mark.parametrize("seed", [0, 1])
def test_leaves_are_kept_apart(seed: int) -> None:
    photographs, alike = photographs_of(leaves=30)
    _, parts = split(photographs, alike, seed)
    train, test = parts == "train", parts == "test"
    assert alike[train][:, test].max() <= 0.5
    by_leaf = parts.reshape(-1, 3) == "test"
    assert (by_leaf.all(1) == by_leaf.any(1)).all()
    assert 0 < test[:90].sum() <= 27
    assert 0 < test[90:].sum() <= 27
    assert train.any()


def test_neighbours_hang_together_where_they_are_a_little_alike() -> None:
    photographs = [Photograph(Path(f"spot_{number}.jpg"), "spot", number, "train") for number in (1, 2, 7)]
    alike = np.full((3, 3), 0.3)
    groups, _ = split(photographs, alike, seed=0)
    assert groups[0] == groups[1] != groups[2]


def test_turned_copies_are_left_out(tmp_path: Path) -> None:
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
    trained = vgg()
    torch.save(trained.state_dict(), tmp_path / "vgg.pt")
    classifier = load_classifier("benchmarks.leaves:vgg", str(tmp_path / "vgg.pt"))
    picture = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(classifier.scores(picture), trained.eval()(picture))
