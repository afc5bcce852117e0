from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MODEL = "tests.test_cli:small_net"


def save_picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 240), Image.Resampling.BICUBIC).save(file)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of five pictures."""
    for index in range(5):
        save_picture(tmp_path / "pictures" / f"{index}.jpg", index)
    return tmp_path / "pictures"
