import json
import os
import resource
import subprocess
import sys
from inspect import getdoc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import captum_fusion
from captum_fusion import LayerScoreCam, LayerXGradCam, cli, explain
from captum_fusion.__main__ import main
from captum_fusion._app import console, job
from captum_fusion._app.methods import METHODS as KNOWN
from captum_fusion.cli import run
from captum_fusion.explain import Explainer
from tests.conftest import SmallNet, forked


def small_net() -> SmallNet:
    torch.manual_seed(3)
    return SmallNet()


def save_picture(file: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def inputs_of(saved: np.lib.npyio.NpzFile) -> Tensor:
    """The model's input: the saved pixels, normalized as for ImageNet."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((torch.from_numpy(saved["pixels"]) - mean) / std)[None]


METHODS = ["grad-cam++", "saliency", "fusion(x-grad-cam,union-cam)"]
SMALL = ["--model", "tests.app.test_cli:small_net", "--size", "24"]


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    return save_picture(tmp_path / "photograph.png")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not look at the picture, which takes most of the time."""
    monkeypatch.setattr(job, "draw", lambda explanations, *_: str(explanations[0].target).encode())


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
        assert drawn.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert picture.stat().st_size < 500_000
    with np.load(maps) as saved:
        metadata = json.loads(str(saved["metadata"]))
        stages = {"Grad-CAM", "Denoised Grad-CAM", "Score-CAM", "Combined", "Fusion-CAM"}
        assert set(saved) == stages | {"metadata", "pixels"}
        assert saved["pixels"].shape == (3, 24, 24)
        mask, inputs = torch.from_numpy(saved["Fusion-CAM"]), inputs_of(saved)
    assert mask.shape == (24, 24)
    assert (metadata["target"], metadata["layer"]) == (2, "relu")
    assert (metadata["percentile"], metadata["weighting"], metadata["tolerance"]) == (10, "raw", 0)
    # The probability kept is that of the masked picture.
    with torch.no_grad():
        kept = small_net()(inputs * mask).softmax(1)[0, 2]
    assert metadata["masked_probabilities"]["Fusion-CAM"] == pytest.approx(kept.item(), abs=1e-5)


def binary() -> SmallNet:
    torch.manual_seed(3)
    return SmallNet(classes=1)


@pytest.mark.usefixtures("undrawn")
def test_a_layer_of_tokens(photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", str(photograph), "--model", "timm:test_vit", "--weights", "none", "--methods", "grad-cam"]
    arguments += ["--output", str(tmp_path / "out.png"), "--layer", "blocks.3", "--force"]
    for grid, size in (([], "10x10"), (["--grid", "10", "10"], "10x10")):
        assert run([*arguments, *grid]) == 0
        assert f"by the layer blocks.3, 64 channels of {size}, a view of tokens" in capsys.readouterr().out
    assert run([*arguments, "--grid", "7", "7"]) == cli.REFUSED
    assert "101 tokens do not fit the grid (7, 7)" in capsys.readouterr().err


class NanNet(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.nan


def nan_net() -> SmallNet:
    return NanNet()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The text on standard error; standard output must be empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_explain_never_overwrites_what_it_reads(
    photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str | None
) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(small_net().state_dict(), weights)
    for option, read in (("--output", photograph), ("--save-npz", photograph), ("--save-npz", weights)):
        written = read
        if link is not None:
            written = tmp_path / f"link{read.suffix}"
            written.unlink(missing_ok=True)
            getattr(written, link)(read)
        before = read.read_bytes()
        arguments = ["explain", str(photograph), *SMALL, "--weights", str(weights), option, str(written)]
        arguments += ["--output", str(tmp_path / "out.png")] if option != "--output" else []
        assert run(arguments) == 2
        (line,) = lines_of(capsys)
        assert f"{option} {written} would overwrite" in line
        assert read.read_bytes() == before
    assert run(["explain", str(photograph), *SMALL, "--output", "a.png", "--save-npz", "a.png"]) == 2
    assert "--output a.png and --save-npz a.png are the same file; expected two" in lines_of(capsys)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--output", "out.txt"], "cannot be written as out.txt; expected one of"),
        (
            ["explain", "--methods", "grad-cam", "scorcam"],
            "Unknown method 'scorcam'. Did you mean 'score-cam', 'winsor-cam' or 'ss-cam'?",
        ),
        (["explain", "--layer", "featurs"], "no layer 'featurs'. Did you mean 'features'?"),
        (["explain", "--target", "7"], "target is 7; expected an index below 3"),
        (["explain", "--model", "resnet5O"], "Unknown torchvision classifier 'resnet5O'. Did you mean 'resnet50'"),
        (["explain", "--size", "24.5"], "expected a whole number, not '24.5'"),
        (["explain", "--size", "0"], "size is 0; expected at least 1"),
        (["explain", "--mean", "0", "0", "nan"], "mean is (0.0, 0.0, nan); expected numbers"),
        (["explain", "--device", "gpu"], "device is 'gpu', which cannot be used"),
        (["explain", "--device", "meta"], "device is 'meta', which cannot be used"),
        (
            ["explain", "--layer", "nope"],
            "no layer 'nope'. Its feature maps: stem (4, 12, 12), ",
        ),
        (["explain", "--weights", "photograph.png"], "photograph.png does not hold weights only"),
        (["explain", "--weights", "missing.pt"], "missing.pt: No such file or directory"),
        (["explain", "--colour", "red"], "--colour"),
        (
            ["explain", "--output", "labels.json/out.png"],
            "but labels.json is no folder",
        ),
        (["explain", "--save-predictions", "top.txt"], "top.txt; expected a file ending in .csv or .json"),
        (["explain", "--classes", "labels.json"], "labels.json cannot be read as category names"),
        (["explain", "--top", "0"], "top is 0; expected at least 1"),
        (["explain", "--output", "labels.json/out"], "--output is labels.json/out, but labels.json is no folder"),
        (["explain", "--output", "."], "--output photograph.png would overwrite the image"),
        (["explain", "--output", "labels.json"], "labels.json already exists; choose another --output or pass --force"),
        (["explain", "folder.png"], "folder.png is a folder without images"),
        (["explain", "other.png"], "--output is out.png for 2 images; expected a folder"),
        (["explain", "https://example.org/cat.jpg"], "cat.jpg is a URL. URLs are not supported; pass a local file"),
        (["explain", "--percentile", "100"], "percentile is 100.0; expected a number in [0, 100)"),
        (["explain", "--tolerance", "1"], "tolerance is 1.0; expected a number in [0, 1)"),
        (["explain", "--weighting", "rwa"], '--weighting. Choose from: "raw", "released", "normalized"'),
        (["explain", "--alpha", "1.5"], "alpha is 1.5; expected a number in [0, 1]"),
        (["explain", "--boxes", "0"], "boxes is 0.0; expected a number in (0, 1]"),
        (["explain", "-t", "1", "-t", "2", "--save-npz", "out.npz"], "--save-npz saves the maps of one target"),
        (
            ["explain", "--model", "tests.app.test_cli:nan_net"],
            "test_cli:nan_net returns scores that are not finite",
        ),
        (["benchmark", "--model", "resnet5O"], "Unknown torchvision classifier 'resnet5O'"),
        (["benchmark", "--steps", "5.5"], "expected a whole number, not '5.5'"),
        (["benchmark", "--limit", "2.7"], "expected a whole number, not '2.7'"),
        (["benchmark", "--labels", "labels.json"], "labels.json is not JSON: Expecting"),
        (["benchmark", "--images", "imagenet:missing"], "images is imagenet:missing, which cannot be read: "),
        (["report", "missing"], "missing is not a folder"),
    ],
)
def test_messages_name_what_they_are_about_in_one_line(
    photograph: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(photograph.parent)
    Path("folder.png").mkdir()
    Path("labels.json").write_text("{")
    name, *more = arguments
    if name == "explain":
        model = SMALL if "--model" not in more else ["--size", "24"]
        arguments = [name, photograph.name, *(model if "--size" not in more else SMALL[:2]), *more]
        arguments += ["--output", "out.png"] if "--output" not in more else []
    elif name == "benchmark":
        images = [] if "--images" in more else ["--images", "."]
        arguments = [name, *images, "--output", "out", "--model", SMALL[1], *more]
    before = sorted(photograph.parent.iterdir())
    assert run(arguments) == 2
    (line,) = lines_of(capsys)
    assert line.startswith("captum-fusion: ")
    assert message in line
    assert sorted(photograph.parent.iterdir()) == before


def test_verbose_shows_the_rest(photograph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", str(photograph), *SMALL, "--target", "7"]
    for verbose in ([*arguments, "--verbose"], ["--verbose", *arguments]):
        assert run(verbose) == 2
        lines = lines_of(capsys)
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[-1] == "captum-fusion: target is 7; expected an index below 3, the model's number of classes"


def test_errors_of_any_kind_are_one_line_with_their_kind(
    photograph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("somewhere\nelse")

    arguments = ["explain", str(photograph), *SMALL, "--output", str(photograph.parent / "out.png")]
    monkeypatch.setattr(Explainer, "open", fail)
    assert run(arguments) == 2
    assert lines_of(capsys) == [r"captum-fusion: KeyError: 'somewhere\nelse'"]
    monkeypatch.undo()
    # That of a method names the method.
    monkeypatch.setattr(LayerXGradCam, "attribute", fail)
    assert run([*arguments, "--methods", "x-grad-cam"]) == 2
    assert lines_of(capsys) == [r"captum-fusion: x-grad-cam fails: KeyError: 'somewhere\nelse'"]


def test_interrupted(photograph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Explainer, "open", interrupt)
    assert run(["explain", str(photograph), *SMALL, "--output", str(photograph.parent / "out.png")]) == 130
    assert lines_of(capsys) == ["captum-fusion: interrupted"]

    class Interrupted:
        __getattr__ = interrupt

    # While it is imported.
    monkeypatch.setitem(sys.modules, "captum_fusion.cli", Interrupted())
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert lines_of(capsys) == ["captum-fusion: interrupted"]


def to_a_reader_that_left(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.stdout = os.fdopen(1, "w")
    sys.exit(run(arguments))


def on_a_full_disk(arguments: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    assert run(arguments) == 2


def test_a_reader_that_has_seen_enough_does_not_cost_the_picture(photograph: Path, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    arguments = ["explain", str(photograph), *SMALL, "--methods", "score-cam", "--output", str(picture)]
    process = forked(to_a_reader_that_left, arguments)
    process.join()
    assert process.exitcode == 0
    with Image.open(picture) as drawn:
        assert drawn.width > 250


def test_a_full_disk_leaves_no_half_of_a_picture(photograph: Path, tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"what was there before")
    (tmp_path / "out.npz").write_bytes(b"and this")
    arguments = ["explain", str(photograph), *SMALL, "--methods", "score-cam", "--output", str(tmp_path / "out.png")]
    arguments += ["--force"]
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    process = forked(on_a_full_disk, [*arguments, "--save-npz", str(tmp_path / "out.npz")])
    process.join()
    assert process.exitcode == 0
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_cannot_be_written_is_found_before_computing(
    photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # No model is loaded.
    monkeypatch.setattr(explain, "Explainer", None)
    with monkeypatch.context() as patch:
        # Without TeX.
        patch.setenv("PATH", "")
        assert run(["explain", str(photograph), "--output", str(tmp_path / "out.pgf")]) == 2
        assert "An image cannot be written as out.pgf: 'xelatex'" in lines_of(capsys)[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        for output in (tmp_path / "out.png", tmp_path, tmp_path / "new" / "deep"):
            assert run(["explain", str(photograph), "--output", str(output)]) == 2
            assert f"{output} cannot be written: permission denied" in lines_of(capsys)[0]
    assert [file.name for file in tmp_path.iterdir()] == ["photograph.png"]


def against_net() -> SmallNet:
    net = small_net()
    with torch.no_grad():
        net.head.weight.abs_().neg_()
    return net


def test_empty_maps_are_drawn_and_told(photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "tests.app.test_cli:against_net", "--size", "24"]
    arguments = ["explain", str(photograph), *model, "--methods", "grad-cam", "--output", str(tmp_path / "out.png")]
    assert run(arguments) == 0
    assert "grad-cam found no positive evidence for the class" in capsys.readouterr().out
    assert (tmp_path / "out.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_pictures_that_are_not_8_bits_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((30, 40), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    files = ["--output", str(tmp_path / "out.png"), "--save-npz", str(tmp_path / "maps.npz")]
    assert run(["explain", str(tmp_path / "deep.png"), *SMALL, "--methods", "grad-cam", *files]) == 0
    assert "deep.png: 16-bit values are scaled from [0, 65535]" in capsys.readouterr().out
    with np.load(tmp_path / "maps.npz") as saved:
        np.testing.assert_allclose(saved["pixels"], 128 / 255, atol=1e-6)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    # Whatever is imported with the package itself cannot be interrupted: no code of ours runs before it. Help need not
    # wait for what computes and draws, nor does the package run as a module.
    script = """
import runpy, sys, captum_fusion
heavy = {"torch", "captum", "matplotlib", "pandas", "scipy", "numpy"}
assert not heavy & set(sys.modules)
from captum_fusion.cli import run
for arguments in (["explain", "--help"], ["benchmark", "--help"], ["cat.jpg"]):
    run(arguments)
sys.argv[1:] = ["--help"]
try:
    runpy.run_module("captum_fusion", run_name="__main__")
except SystemExit as end:
    assert not end.code
sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
    for name in captum_fusion.__all__:
        assert getattr(captum_fusion, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'LayerFusoinCam'"):
        captum_fusion.LayerFusoinCam  # noqa: B018


def test_says_which_extra_is_missing(
    photograph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(package: str, *modules: str) -> None:
        # A module that is None in sys.modules cannot be imported, as if it were not installed.
        monkeypatch.setitem(sys.modules, package, None)
        for module in modules:
            monkeypatch.delitem(sys.modules, f"captum_fusion.{module}", raising=False)

    without("matplotlib", "_app.job", "_app.drawing")
    assert run(["explain", str(photograph)]) == cli.REFUSED
    without("cyclopts", "cli", "_app.settings")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == cli.REFUSED
    needed = "captum-fusion: the command needs the package {}: pip install '.[cli]' in a checkout"
    assert lines_of(capsys) == [needed.format("matplotlib"), needed.format("cyclopts")]


built: list[SmallNet] = []


def counted_net() -> SmallNet:
    built.append(small_net())
    return built[-1]


COUNTED = ["--model", "tests.app.test_cli:counted_net", "--size", "24", "--methods", "grad-cam"]


@pytest.mark.usefixtures("undrawn")
def test_many_pictures_are_explained_by_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    built.clear()
    for folder, name in product("ab", ["cat.png", "ca t ü.png"]):
        Path(folder).mkdir(exist_ok=True)
        save_picture(Path(folder, name), seed=ord(folder))
    Path("-odd.png").write_bytes(Path("a/cat.png").read_bytes())
    files = ["a/cat.png", "b/cat.png", "a/ca t ü.png", "a/cat.png", "-odd.png"]
    assert run(["explain", *COUNTED, "-t", "1", "-o", "seen", "--save-npz", "maps", "--", *files]) == 0
    assert len(built) == 1
    lines = capsys.readouterr().out.splitlines()
    # What is given twice is explained once; what has the same name is numbered.
    assert [line.split(": ")[0] for line in lines[:-1]] == ["a/cat.png", "b/cat.png", "a/ca t ü.png", "-odd.png"]
    assert lines[-1] == "4 of 4 images explained"
    names = {"-odd", "ca t ü", "cat", "cat-2"}
    assert {file.name for file in Path("seen").iterdir()} == {f"{name}.png" for name in names}
    assert {file.name for file in Path("maps").iterdir()} == {f"{name}.npz" for name in names}
    assert "b/cat.png: 1 " in lines[1]
    assert lines[1].endswith("; explained in seen/cat-2.png")
    for name, image in (("cat", "a/cat.png"), ("cat-2", "b/cat.png")):
        with np.load(f"maps/{name}.npz") as saved:
            assert json.loads(str(saved["metadata"]))["image"] == image


@pytest.mark.usefixtures("undrawn")
def test_a_broken_picture_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        save_picture(Path(name))
    Path("half.png").write_bytes(Path("a.png").read_bytes()[:2000])
    Path("notes.png").write_text("no picture")
    Path("folder").mkdir()
    Image.new("RGB", (1, 60000)).save("long.png")
    lost = ["notes.png", "missing.png", "c*.png", "half.png", "long.png"]
    assert run(["explain", "half.png", "a.png", "long.png", *lost[:3], "b.png", *COUNTED]) == cli.FAILED
    captured = capsys.readouterr()
    complaints = captured.err.splitlines()
    # What needs no reading is told first.
    for format_error, name in zip(complaints, lost, strict=True):
        assert name in format_error
    assert "no file matches c*.png" in complaints[2].lower()
    assert captured.out.splitlines()[-1] == f"2 of 7 images explained; failed: {', '.join(lost)}"
    assert sorted(file.name for file in Path("explained").iterdir()) == ["a.png", "b.png"]
    built.clear()
    assert run(["explain", *lost[:3], *COUNTED]) == cli.REFUSED
    assert not built
    # A single one is refused as before.
    assert run(["explain", "c*.png", *COUNTED]) == cli.REFUSED
    assert run(["explain", "folder", *COUNTED]) == cli.REFUSED


@pytest.mark.usefixtures("undrawn")
def test_what_is_wrong_with_every_picture_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [save_picture(Path(f"{number}.png")).name for number in range(3)]
    for wrong in (["--target", "7"], ["--layer", "nope"]):
        assert run(["explain", *files, *COUNTED, *wrong]) == cli.REFUSED
        assert len(lines_of(capsys)) == 1
    assert not Path("explained").exists()

    # What only some of them bring about is theirs.
    attribute = LayerScoreCam.attribute
    calls: list[int] = []

    def fail_once(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return attribute(*arguments, **options)  # type: ignore[arg-type,call-overload]

    monkeypatch.setattr(LayerScoreCam, "attribute", fail_once)
    assert run(["explain", *files, *COUNTED[:4], "--methods", "score-cam"]) == cli.FAILED
    captured = capsys.readouterr()
    assert captured.err == "captum-fusion: 1.png: score-cam fails: RuntimeError: out of memory\n"
    assert captured.out.splitlines()[-1] == "2 of 3 images explained; failed: 1.png"


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_overwritten_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [save_picture(Path(f"{number}.png")).name for number in range(2)]
    assert run(["explain", *files, *COUNTED, "--save-npz", "explained"]) == 0
    before = {file: file.read_bytes() for file in Path("explained").iterdir()}
    capsys.readouterr()
    different = [*COUNTED, "--target", "2", "--alpha", "0.5"]
    for arguments, message in (
        ([*files, "--save-npz", "explained"], "explained/0.png already exists, as do 3 more files; "),
        (["1.png"], "explained/1.png already exists; "),
        (["0.png", "-o", "new.png", "--save-npz", "explained"], "explained/0.npz already exists; "),
    ):
        assert run(["explain", *arguments, *different]) == cli.REFUSED
        assert message in lines_of(capsys)[0]
    assert {file: file.read_bytes() for file in Path("explained").iterdir()} == before
    assert run(["explain", *files, *different, "--save-npz", "explained", "--force"]) == 0
    assert all(file.read_bytes() != content for file, content in before.items())
    # A device is no file that could be lost.
    assert run(["explain", "0.png", *COUNTED, "--output", "new.png", "--save-npz", "/dev/null"]) == 0


@pytest.mark.usefixtures("undrawn")
def test_two_pictures_are_not_written_to_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        save_picture(Path(name))
    Path("seen").mkdir()
    Path("seen/a.png").symlink_to("b.png")
    assert run(["explain", "a.png", "b.png", *COUNTED, "--output", "seen"]) == cli.REFUSED
    assert "--output seen/a.png and --output seen/b.png are the same file; expected two" in lines_of(capsys)[0]
    # One file by two paths is one picture.
    assert run(["explain", "a.png", str(tmp_path / "a.png"), *COUNTED, "--output", "once.png"]) == 0


@pytest.mark.usefixtures("undrawn")
def test_a_long_name_and_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = save_picture(Path(f"{'x' * 245}.png"))
    assert run(["explain", str(long), *COUNTED]) == 0
    assert [file.name for file in Path("explained").iterdir()] == [long.name]
    capsys.readouterr()
    assert run(["explain", "", *COUNTED]) == cli.REFUSED
    assert "'' is not a file name; expected an image" in lines_of(capsys)[0]


@pytest.mark.usefixtures("undrawn")
def test_a_folder_stands_for_its_pictures_and_folders_of_results_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shots").mkdir()
    for name in ("b.png", "a.png"):
        save_picture(Path("shots", name))
    Path("shots/notes.txt").write_text("no picture")
    results = ["-o", "new/maps", "--save-npz", "other/new/", "--save-predictions", "tables/top.csv", "--top", "2"]
    assert run(["explain", "shots", *COUNTED, *results]) == 0
    assert sorted(str(file) for file in Path().rglob("*.png") if file.parts[0] == "new") == [
        "new/maps/a.png",
        "new/maps/b.png",
    ]
    assert sorted(file.name for file in Path("other/new").iterdir()) == ["a.npz", "b.npz"]
    assert Path("tables/top.csv").read_text().count("\n") == 1 + 2 * 2
    capsys.readouterr()
    assert run(["explain", "shots", *COUNTED, "-o", "again", "--save-predictions", "tables/top.csv"]) == cli.REFUSED
    assert "tables/top.csv already exists" in lines_of(capsys)[0]
    assert run(["explain", "shots/a.png", *COUNTED, "-o", "third/x.png"]) == 0
    assert Path("third/x.png").is_file()


def test_layers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", *COUNTED[:4], "--list-layers"]) == 0
    names = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert names == ["stem", "features", "relu"]


def grey_net() -> nn.Module:
    torch.manual_seed(3)
    net = small_net()
    net.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
    return net


def test_a_model_of_one_channel(tmp_path: Path) -> None:
    Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30)).save(tmp_path / "grey.png")
    arguments = ["explain", str(tmp_path / "grey.png"), "-m", "tests.app.test_cli:grey_net", "--size", "24"]
    arguments += ["--methods", "grad-cam", "--mean", "0.5", "--std", "0.25", "--output", str(tmp_path / "out.png")]
    assert run(arguments) == 0


@pytest.mark.usefixtures("undrawn")
def test_without_a_terminal_progress_is_a_line_now_and_then(
    photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_SECONDS_PER_LINE", 0)
    arguments = ["explain", str(photograph), *SMALL, "--methods", "score-cam", "--output", str(tmp_path / "out.png")]
    assert run(arguments) == 0
    assert "captum-fusion: score-cam, 0 of " in capsys.readouterr().err


def test_the_short_options_are_those_of_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for command, options in (
        ("explain", ["--model -m", "--layer -l", "--target -t", "--output -o"]),
        ("page", ["--model -m", "--layer -l"]),
        ("benchmark", ["--model -m", "--layer -l", "--target -t", "--output -o"]),
    ):
        assert run([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in options)


def test_several_classes_have_a_row_each(photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", str(photograph), *COUNTED]
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert run([*arguments, "--target", "1", "--output", str(one)]) == 0
    capsys.readouterr()
    assert run([*arguments, "--target", "1", "--target", "01", "--target", "2", "--output", str(two)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14] for line in lines if line.startswith("Explaining")] == ["Explaining 1 1", "Explaining 2 2"]
    with Image.open(one) as first, Image.open(two) as both:
        assert both.height > 1.7 * first.height
        assert both.width < 1.2 * first.width


@pytest.mark.usefixtures("undrawn")
def test_settings_reach_the_maps(photograph: Path, tmp_path: Path) -> None:
    saved: dict[str, np.lib.npyio.NpzFile] = {}
    settings = ["--percentile", "60", "--weighting", "released", "--tolerance", "0.5", "--activation", "sigmoid"]
    for name, options in {"default": [], "changed": settings}.items():
        arguments = ["explain", str(photograph), *SMALL, "-l", "stem", "-t", "1", *options]
        arguments += ["-o", str(tmp_path / f"{name}.png"), "--save-npz", str(tmp_path / f"{name}.npz")]
        assert run(arguments) == 0
        saved[name] = np.load(tmp_path / f"{name}.npz")
    metadata = json.loads(str(saved["changed"]["metadata"]))
    expected = {"layer": "stem", "percentile": 60, "weighting": "released", "tolerance": 0.5}
    assert metadata.items() >= expected.items()
    # More of the gradient map is left out.
    changed, default = ((saved[name]["Denoised Grad-CAM"] == 0).mean() for name in ("changed", "default"))
    assert changed > 0.55 > default
    with torch.no_grad():
        probability = small_net()(inputs_of(saved["changed"])).sigmoid()[0, 1].item()
    assert metadata["probability"] == pytest.approx(probability, abs=1e-5)


def test_methods_are_listed_with_what_their_classes_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == {*KNOWN, "fusion(gradient,region)"}
    assert lines["score-cam"] == (getdoc(LayerScoreCam) or "").splitlines()[0]
    assert lines["grad-cam"] == "Computes GradCAM attribution for chosen layer."
    assert all(line.endswith(".") for line in lines.values())


@pytest.mark.parametrize("picture", ["cat.jpg", "a/my cat.png"])
def test_a_picture_without_a_command_is_meant_to_be_explained(capsys: pytest.CaptureFixture[str], picture: str) -> None:
    assert run([picture, "--model", "resnet50"]) == cli.REFUSED
    shown = "'a/my cat.png'" if " " in picture else picture
    (line,) = lines_of(capsys)
    assert line.endswith(f"; did you mean: captum-fusion explain {shown} --model resnet50")
    assert run(["explan", picture]) == cli.REFUSED
    assert 'Did you mean "explain"?' in lines_of(capsys)[0]


@pytest.mark.usefixtures("undrawn")
def test_categories_that_hold_a_word_are_proposed_first(photograph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "squeezenet1_1", "--weights", "none", "--size", "64", "--methods", "grad-cam"]
    arguments = ["explain", str(photograph), *model, "-o", str(photograph.parent / "out.png")]
    assert run([*arguments, "-t", "tiger cat"]) == 0
    capsys.readouterr()
    assert run([*arguments, "--force", "-t", "cat"]) == 2
    close = lines_of(capsys)[0].partition("Did you mean ")[2]
    assert all(repr(name) in close for name in ("tiger cat", "persian cat", "siamese cat", "egyptian cat"))


def test_every_method_is_drawn_saved_and_announced_on_a_terminal(
    photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = tmp_path / "maps.npz"
    arguments = ["explain", str(photograph), *SMALL, "--layer", "stem", "--methods", *METHODS]
    assert run([*arguments, "--output", str(tmp_path / "out.pdf"), "--save-npz", str(maps)]) == 0
    assert capsys.readouterr().err == ""
    with np.load(maps) as saved:
        assert set(METHODS) < set(saved)
        assert json.loads(str(saved["metadata"]))["layer"] == "stem"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run([*arguments, "--output", str(tmp_path / "out.png")]) == 0
    shown = capsys.readouterr().err
    assert all(method in shown for method in METHODS)
