import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_fusion.__main__ import main
from captum_fusion.cli import run
from tests.conftest import SmallNet


def small_net() -> SmallNet:
    torch.manual_seed(3)
    return SmallNet()


METHODS = ["grad-cam", "grad-cam++", "score-cam", "saliency", "fusion-cam:raw", "fusion(x-grad-cam,union-cam)"]
SMALL = ["--model", "tests.test_cli:small_net", "--size", "24"]


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    file = tmp_path / "photograph.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file)
    return file


def test_explain_writes_a_picture_and_the_maps(
    photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, maps = tmp_path / "out.png", tmp_path / "maps.npz"
    arguments = ["explain", str(photograph), *SMALL, "--target", "2", "--output", str(picture), "--save-npz", str(maps)]
    assert run(arguments) == 0
    output = capsys.readouterr().out
    assert "Explaining 2 2 by the layer relu" in output
    assert str(picture) in output
    with Image.open(picture) as drawn:
        assert drawn.width > 500
    with np.load(maps) as saved:
        metadata = json.loads(str(saved["metadata"]))
        stages = {"Grad-CAM", "Denoised Grad-CAM", "Score-CAM", "Combined", "Fusion-CAM"}
        assert set(saved) == stages | {"metadata", "pixels"}
        assert saved["pixels"].shape == (3, 24, 24)
        mask = torch.from_numpy(saved["Fusion-CAM"])
    assert mask.shape == (24, 24)
    assert (metadata["target"], metadata["layer"]) == (2, "relu")
    # The probability kept is that of the masked picture.
    with torch.no_grad():
        pixels = torch.from_numpy(np.load(maps)["pixels"])
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        kept = small_net()(((pixels - mean) / std * mask)[None]).softmax(1)[0, 2]
    assert metadata["probability_kept"]["Fusion-CAM"] == pytest.approx(kept.item(), abs=1e-5)


def test_explain_with_chosen_methods(photograph: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps.npz"
    arguments = ["explain", str(photograph), *SMALL, "--layer", "stem", "--methods", *METHODS]
    assert run([*arguments, "--output", str(tmp_path / "out.pdf"), "--save-npz", str(maps)]) == 0
    with np.load(maps) as saved:
        assert set(METHODS) < set(saved)
        assert json.loads(str(saved["metadata"]))["layer"] == "stem"


def test_explain_a_torchvision_model_with_random_weights_and_a_category_name(photograph: Path, tmp_path: Path) -> None:
    arguments = ["explain", str(photograph), "--model", "squeezenet1_1", "--weights", "none", "--size", "64"]
    assert (
        run([*arguments, "--target", "tiger cat", "--methods", "grad-cam", "--output", str(tmp_path / "out.png")]) == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "missing/out.png"], "The folder missing of missing/out.png does not exist"),
        (["--save-npz", "missing/out.npz"], "The folder missing"),
        (["--output", "out.txt"], "cannot be written as out.txt; expected one of"),
        (
            ["--methods", "grad-cam", "scorcam"],
            "no method 'scorcam'. Close: score-cam.",
        ),
        (["--layer", "featurs"], "no layer 'featurs'. Close: features"),
        (["--target", "7"], "target is 7; expected an index below 3"),
        (["--model", "resnet5O"], "no torchvision classifier 'resnet5O'. Close: resnet50"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    photograph: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    model = [] if "--model" in arguments else SMALL
    monkeypatch.chdir(photograph.parent)
    assert run(["explain", str(photograph), *model, *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("captum-fusion: ")
    assert message in error[0]
    assert not (photograph.parent / "fusion_cam.png").exists()


def test_files_that_are_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    assert run(["explain", str(text)]) == 2
    assert "notes.png cannot be read: it is not a picture of a known kind" in capsys.readouterr().err
    assert run(["explain", str(tmp_path / "missing.png")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "captum_fusion", "explain", "--help"], capture_output=True, text=True, check=True
    )
    assert "--save-npz" in result.stdout


def test_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # A module that is None in sys.modules cannot be imported, as if it were not installed.
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    monkeypatch.delitem(sys.modules, "captum_fusion.cli")
    monkeypatch.delitem(sys.modules, "captum_fusion._settings")
    with pytest.raises(SystemExit, match=r"needs the package cyclopts: pip install 'captum-fusion\[cli\]'"):
        main()
