"""The texts and pictures of a report."""

import base64
import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from captum_fusion.benchmark import NothingExplainedError, Settings, report, run
from captum_fusion.benchmark._charts import crop_seen
from captum_fusion.benchmark._report import write_report
from captum_fusion.cli import run as command
from tests.benchmark.conftest import MODEL, QUICK, bench, made_up, records, write_records
from tests.conftest import SmallNet


class AgainstEverything(SmallNet):
    """Every feature speaks against every class."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.head.weight.abs_().neg_()


class ShakyNet(SmallNet):
    """Its scores depend on the batch a little, as those of a GPU do."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * (1 + 1e-4 * (self.calls % 7))


class ChokingNet(SmallNet):
    """Fails on dark pictures."""

    def forward(self, x: Tensor) -> Tensor:
        if (x.mean((1, 2, 3)) < -1.5).any():
            raise ArithmeticError("too dark")
        return super().forward(x)


class NanNet(SmallNet):
    """Gives NaN for bright pictures."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.where(x.mean((1, 2, 3)) > 1.5, torch.nan, 0.0)[:, None]


def net(kind: str) -> str:
    return f"tests.benchmark.test_report:{kind}"


def test_charts_show_the_part_of_the_picture_that_the_model_saw(tmp_path: Path) -> None:
    # 512 by 320 pixels: resized to 409 by 256, of which the middle 224 by 224 are seen, in the picture
    # 280.4 pixels wide and 280 high from 115.2 and 20. That part is green, the rest red.
    pixels = np.zeros((320, 512, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    pixels[20:300, 115:396] = (0, 255, 0)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    folder = bench(tmp_path / "pictures", tmp_path / "out", **QUICK)
    (record,) = records(folder)
    assert record["frame"] == pytest.approx([115.2, 20, 395.6, 300], abs=0.1)
    shown, remark = crop_seen(Path(record["file"]), record["frame"])
    assert remark == ""
    # Green up to the edges, and not a magnified part of it either: the edge itself is next to the red.
    assert (shown[2:-2, 2:-2] == [0, 1, 0]).all()
    wider, _ = crop_seen(Path(record["file"]), [110, 15, 401, 305])
    assert (wider[[0, -1], :, 0] > 0.9).all()
    assert (wider[:, [0, -1], 0] > 0.9).all()
    assert crop_seen(tmp_path / "gone.png", record["frame"])[1] == "image missing"


@pytest.mark.usefixtures("charts")
def test_empty_maps_are_drawn_and_told(pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(pictures / "0.jpg")
    folder = bench(pictures, tmp_path / "out", **QUICK | {"models": [net("AgainstEverything")], "limit": 2})
    assert all(record["empty"] and not any(base64.b64decode(record["map"])) for record in records(folder))
    text = (folder / "summary.md").read_text()
    assert "2 of the 2 maps of grad-cam are empty: no positive evidence for the class" in text
    with Image.open(folder / "explanations.png") as drawn:
        assert drawn.width > 100
    report(folder)


def test_a_map_that_keeps_everything_changes_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_fusion.attr.x_grad_cam import LayerXGradCam

    def everything(_: object, inputs: Tensor, **__: object) -> Tensor:
        return torch.ones(len(inputs), 1, 7, 7)

    monkeypatch.setattr(LayerXGradCam, "attribute", everything)
    options = QUICK | {"models": [net("ShakyNet")], "methods": ["x-grad-cam"]}
    folder = bench(pictures, tmp_path / "out", **options | {"metrics": ["confidence_drop", "confidence_increase"]})
    found = records(folder)
    assert [record["confidence_increase"] for record in found] == [0] * 5
    assert [record["confidence_drop"] for record in found] == [0] * 5


def test_one_picture_that_the_model_fails_on_is_one_error(pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(pictures / "1.jpg")
    Image.new("RGB", (50, 40), "white").save(pictures / "3.jpg")
    Image.new("RGB", (5000, 1)).save(pictures / "5.png")
    for kind, image, reason in (
        ("ChokingNet", "1.jpg", "ArithmeticError: too dark"),
        ("NanNet", "3.jpg", f"RuntimeError: {net('NanNet')} returns scores that are not finite"),
    ):
        folder = bench(pictures, tmp_path / kind, **QUICK | {"models": [net(kind)]}, batch_size=3)
        errors = {record["image"]: record["error"] for record in records(folder) if "error" in record}
        thin = "The image cannot be read: it has 5000 x 1 pixels, and the model would see less than one in 100 of them"
        assert errors.pop("5.png").startswith(thin)
        assert errors == {image: reason}
        assert pd.read_csv(folder / "summary.csv")["explanations"].tolist() == [4]
        assert f"| 1 | {reason} | {image} |" in (folder / "summary.md").read_text()


def test_when_all_pictures_fail_the_status_is_1_and_the_reasons_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        (tmp_path / "pictures" / f"{index}.png").write_text("text")
    (tmp_path / "pictures" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    arguments = ["--images", str(tmp_path / "pictures"), "--output", str(tmp_path / "out"), "--model", MODEL]
    assert command(["benchmark", *arguments, "--methods", "grad-cam"]) == 1
    reason = "4 x The image cannot be read: it is not an image in a supported format"
    captured = capsys.readouterr()
    assert f"Nothing could be explained: {reason}" in captured.err
    assert f"{reason} (0.png)" in captured.out
    assert (
        "| 4 | The image cannot be read: it is not an image in a supported format | 0.png |"
        in (tmp_path / "out" / "summary.md").read_text()
    )
    with pytest.raises(NothingExplainedError):
        bench(tmp_path / "pictures", tmp_path / "out", **QUICK | {"layers": ()})


def test_notes_of_how_pictures_were_read(pictures: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (50, 40), (9, 9, 9, 100)).save(pictures / "transparent.png")
    folder = bench(pictures, tmp_path / "out", **QUICK)
    assert "1 image: transparent parts are shown on white." in (folder / "summary.md").read_text()


def test_a_name_that_is_not_utf_8_and_hostile_texts_lose_no_report(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / os.fsdecode(b"caf\xe9.jpg")).write_text("no picture")
    folder = run(Settings(images=pictures, output=tmp_path / "out", **QUICK), show_progress=True)
    assert "| 1 | The image cannot be read: it is not an image in a supported format | caf\\udce9.jpg |" in (
        folder / "summary.md"
    ).read_text(encoding="utf-8")
    assert "(caf\\udce9.jpg)" in capsys.readouterr().out
    lines = [made_up("a", "0.jpg", confidence_drop=0.1), made_up("a", "|<b>:cat:\n.jpg", error="[red]|\n$x$")]
    write_records(tmp_path / "hostile", lines)
    result = write_report(tmp_path / "hostile")
    assert r"| 1 | [red]\| $x$ | \|&lt;b>:cat: .jpg |" in result.markdown()
    for encoding, arrow in (("utf-8", "↓"), ("cp1252", "?")):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        result.show(Console(file=file, width=100))
        file.seek(0)
        shown = file.read()
        assert f"AD {arrow}" in shown
        assert "[red]|" in shown
        assert ":cat:" in shown


def test_the_table_is_whole_at_any_width(tmp_path: Path) -> None:
    names = ["grad-cam", "fusion(integrated-gradients,guided-grad-cam):released"]
    metrics = {"confidence_drop": 0.18, "confidence_increase": 1, "insertion": 0.5, "deletion": 0.2}
    lines = [made_up(name, f"{i}.jpg", **metrics) for name in names for i in range(3)]
    write_records(tmp_path, [*lines, made_up("grad-cam", "4.jpg") | {"error": "[out] of luck"}])
    result = write_report(tmp_path)
    for width in (80, 60, 200):
        file = io.StringIO()
        result.show(Console(file=file, width=width))
        shown = file.getvalue()
        assert "…" not in shown
        for name in names:
            assert name in shown
        assert "AD ↓" in shown
        assert shown.count("18.0 ± 0.0") == 2
        assert "0.300 ± 0.000" in shown
        assert "AD average drop, AI average increase" in shown
        assert "1 x [out] of luck (4.jpg)" in shown
        # No line is broken in the middle: as wide as asked, but for what cannot be narrower; a part that goes on says
        # so.
        narrowest = max(map(len, names)) + 2 + len("0.300 ± 0.000") + len("  \\")
        table = [line for line in shown.splitlines() if "±" in line]
        assert max(map(len, table)) <= max(width, narrowest)


def test_the_order_is_that_in_which_methods_came(tmp_path: Path) -> None:
    write_records(tmp_path, [made_up(name, "0.jpg", confidence_drop=0.1) for name in ("score-cam", "a", "grad-cam")])
    assert report(tmp_path)["method"].tolist() == ["score-cam", "a", "grad-cam"]


def test_a_folder_without_records(tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "there are no records"), (tmp_path / "missing", "is not a folder")):
        with pytest.raises(ValueError, match=message):
            report(folder)


def test_damaged_lines_are_named_and_left_out(tmp_path: Path) -> None:
    write_records(tmp_path, [made_up("a", "0.jpg", confidence_drop=0.1), made_up("a", "1.jpg", confidence_drop=0.3)])
    writer = tmp_path / "records-00000.jsonl"
    content = writer.read_bytes()
    writer.write_bytes(b"{]\n" + content + b"{]\n" * 7)
    with pytest.warns(
        UserWarning, match=r"records-00000.jsonl lines 1, 4, 5, 6, 7 and 3 more are damaged and left out"
    ):
        assert report(tmp_path)["explanations"].tolist() == [2]
    # A report only reads.
    assert writer.read_bytes() == b"{]\n" + content + b"{]\n" * 7
