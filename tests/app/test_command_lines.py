"""Command lines as practitioners type them: a wrong one says what was expected, and none goes wrong without a word."""

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from captum_fusion import cli
from captum_fusion.cli import REFUSED, run
from tests.conftest import SmallNet


def four() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet(classes=4)


def softmaxed() -> nn.Module:
    return nn.Sequential(four(), nn.Softmax(dim=1))


def double() -> nn.Module:
    return four().double()


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 4))


def model(name: str) -> list[str]:
    return ["-m", f"tests.app.test_command_lines:{name}", "--size", "24"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("cat.png")
    Path("mine.py").write_text("")
    Path("four.txt").write_text("a\nb\n\nd\n")
    Path("weights.pt").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "mine.py:four"], "names a file; expected package.module:callable, for example mine:four in the folder"),
        (["-m", "./mine.py:four"], "for example mine:four in the folder"),
        (["-m", "weights.pt"], "pass --weights weights.pt and the --model that they belong to"),
        (["-m", "hf:./missing"], "hf:./missing names a folder that does not exist"),
        ([*model("double")], "fails on inputs of shape (2, 3, 24, 24) and type torch.float32: "),
        ([*model("four"), "--mean", "123", "116", "103"], "divide a mean and std of 0 to 255 by 255"),
        ([*model("four"), "--activation", "none"], "activation is 'none'; expected one of ('softmax', 'sigmoid')"),
        ([*model("four"), "--classes", "four.txt"], "four.txt holds no category names, or an empty one"),
        ([*model("four"), "--classes", "mine.py"], "mine.py holds no category names"),
        ([*model("flat"), "--list-layers"], "No layer of tests.app.test_command_lines:flat returns a feature map"),
        (["cat.png", "mine.py", *model("four"), "-o", "run.1"], "for 2 images; expected a folder, which must already"),
    ],
)
def test_wrong_command_lines_are_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(folder.iterdir())
    assert run(["explain", "cat.png", *arguments]) == REFUSED
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert message in line
    assert captured.out == ""
    assert [file for file in sorted(folder.iterdir()) if file.name != "__pycache__"] == before


@pytest.mark.usefixtures("folder")
def test_an_unknown_category_without_a_close_one_says_what_is_expected(capsys: pytest.CaptureFixture[str]) -> None:
    Path("names.txt").write_text("ash\nbeech\noak\npine\n")
    assert run(["explain", "cat.png", *model("four"), "--classes", "names.txt", "-t", "-1"]) == REFUSED
    assert "Unknown category '-1'. Expected a category name or an index below 4" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("default")
def test_probabilities_in_place_of_scores_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    for name, warns in (("softmaxed", True), ("four", False)):
        arguments = ["explain", "cat.png", *model(name), "--methods", "score-cam", "-o", f"{name}.png"]
        assert run(arguments) == 0
        error = capsys.readouterr().err
        assert error.count("returns probabilities, and softmax is applied to them again") == warns
        assert len(error.splitlines()) == warns


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("content", ['{"0": "a", "2": "c", "1": "b", "3": "d"}', '{"b": 1, "a": 0, "d": 3, "c": 2}'])
def test_category_names_by_index_and_indices_by_name(capsys: pytest.CaptureFixture[str], content: str) -> None:
    Path("names.json").write_text(content)
    arguments = ["explain", "cat.png", *model("four"), "--methods", "grad-cam", "--classes", "names.json"]
    assert run([*arguments, "-t", "c"]) == 0
    assert "Explaining 2 c by the layer" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_category_names_that_end_in_an_empty_line() -> None:
    Path("names.txt").write_text("a\nb\nc\nd\n\n")
    arguments = ["explain", "cat.png", *model("four"), "--methods", "grad-cam", "--classes", "names.txt"]
    assert run(arguments) == 0


@pytest.mark.usefixtures("folder")
def test_the_default_layer_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", *model("four"), "--list-layers"]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if "the default" in line]
    assert run(["explain", "cat.png", *model("four"), "--methods", "grad-cam"]) == 0
    (name,) = (line.split("│")[1].strip() for line in marked)
    assert f"by the layer {name}," in capsys.readouterr().out


class Shared(SmallNet):
    """Runs its activation on two maps of different sizes, as EfficientNet-Lite does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.relu(self.stem(x))
        return self.head(self.relu(self.features(stem)).mean(dim=(2, 3)))


@pytest.mark.usefixtures("folder")
def test_a_default_layer_that_runs_twice_costs_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "cat.png", "-m", "tests.app.test_command_lines:Shared", "--size", "24"]) == 0
    captured = capsys.readouterr()
    assert "by the layer relu" in captured.out
    assert "ran 2 times" not in captured.err


def test_ports_are_checked_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["page", "--port", "99999", "-m", "nope"]) == REFUSED
    assert capsys.readouterr().err == "captum-fusion: port is 99999; expected a number from 1 to 65535\n"


def test_warnings_name_the_line_of_a_script_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The library's warnings name the script of the command, which shows them in one line, too.
    script = ModuleType("__main__")
    script.__file__ = str(folder / "captum-fusion")
    monkeypatch.setitem(sys.modules, "__main__", script)
    show = partial(cli._warn, set())
    for _ in range(2):
        show("a remark\nof two lines", UserWarning, script.__file__, 8)
    assert capsys.readouterr().err == "captum-fusion: a remark of two lines\n"


@pytest.mark.usefixtures("folder")
def test_a_damaged_run_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("pictures").mkdir()
    Path("cat.png").rename("pictures/cat.png")
    arguments = ["--methods", "grad-cam", "--metrics", "complexity"]
    assert run(["benchmark", "--images", "pictures", "-o", "out", *model("four"), *arguments]) == 0
    Path("out/run.json").write_text("{")
    capsys.readouterr()
    assert run(["report", "out"]) == REFUSED
    assert "run.json is damaged (Expecting" in capsys.readouterr().err
    assert run(["benchmark", "--images", "pictures", "-o", "mine.py", *model("four"), *arguments]) == REFUSED
    assert "output is mine.py, a file; expected a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_a_benchmark_checks_its_model_before_the_output_exists(capsys: pytest.CaptureFixture[str]) -> None:
    Path("names.json").write_text(json.dumps(["a"]))
    for wrong, message in (
        (["-m", "timm:nope"], "has no model 'nope'"),
        (["-m", "hf:./missing"], "names a folder that does not exist"),
        ([*model("four"), "--weights", "missing.pt"], "missing.pt: No such file"),
        ([*model("four"), "--classes", "names.json"], "returns 4 scores for 1 category names"),
        ([*model("four"), "--layer", "nope"], "has no layer 'nope'"),
        ([*model("four"), "--target", "label"], "has no label"),
    ):
        assert run(["benchmark", "--images", ".", "-o", "out", "--methods", "grad-cam", *wrong]) == REFUSED
        assert message in capsys.readouterr().err
        assert not Path("out").exists()
