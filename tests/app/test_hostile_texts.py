"""Names from outside go through every sink as they are: terminal, figure, CSV, JSON, archive and file names."""

import ast
import csv
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.text import Text

from captum_fusion._app import drawing
from captum_fusion._app.console import Output
from captum_fusion._app.messages import printable
from captum_fusion._app.output_files import write_atomically
from captum_fusion.cli import run
from captum_fusion.page._browser import Model, View
from captum_fusion.page._downloads import recipe
from tests.app.test_cli import COUNTED, SMALL, save_picture

HOSTILE = [
    "$x_{1}^",
    ":cat: [bold red]",
    '\x1b[31m"; import os\x07',
    "\u202egnp.exe",
    "猫 и кошка",
    "l" * 300,
    "[1, 2]",
]
# A name that is not UTF-8, as Python holds it.
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")


def test_printable_escapes_controls_alone() -> None:
    assert printable("a\nb\x1b[0m\u202e\udce9 é 猫") == r"a\nb\x1b[0m\u202e\udce9 é 猫"


@pytest.mark.parametrize("name", [*HOSTILE, NOT_UTF8])
def test_the_terminal_and_figures_show_them_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing.warnings, "warn", lambda *_, **__: None)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    output = Output(file=stream, soft_wrap=True, width=400)
    output.print(name)
    stream.flush()
    assert stream.buffer.getvalue().decode().strip("\n") == printable(name)  # type: ignore[attr-defined]
    figure = Figure()
    figure.suptitle(name)
    assert drawing.render(figure, ".png").startswith(b"\x89PNG")
    (title,) = (text for text in figure.findobj(Text) if text.get_text())
    assert title.get_text() == printable(name)
    assert not title.get_parse_math()


@pytest.mark.parametrize("name", [*HOSTILE, "a\nimport os", "a\r\u2028import os", NOT_UTF8])
def test_python_that_reproduces_a_view_holds_them_as_comments_and_strings(name: str) -> None:
    explanation: Any = SimpleNamespace(
        target=1, category=name, maps={"grad-cam": 0}, percentile=10.0, weighting="raw", tolerance=0.0
    )
    picture: Any = None
    tree = ast.parse(recipe(View(picture, [explanation], Model(picture, {"model": name}), [repr(name)]), 0.8))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert modules == ["captum.attr", "captum_fusion.explain"]
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))


def test_they_go_through_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = [save_picture(Path(name)).name for name in ("[1] cat.png", '{"a": 1}.png', "$_^ :cat:.png", NOT_UTF8)]
    Path("classes.json").write_text(json.dumps(HOSTILE[1:4]), encoding="utf-8")
    options = [*SMALL, "--methods", "grad-cam", "--classes", "classes.json"]
    for suffix in ("csv", "json"):
        table = f"out.{suffix}"
        arguments = ["explain", *images, *options, "--save-npz", "maps", "--save-predictions", table, "--force"]
        assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert r"caf\udce9.png: " in shown
    assert "\x1b" not in shown
    assert sorted(file.name for file in Path("explained").iterdir()) == sorted(images)
    rows = json.loads(Path("out.json").read_text())
    assert [row["image"] for row in rows[::3]] == images
    assert {row["category"] for row in rows} == set(HOSTILE[1:4])
    with Path("out.csv").open(newline="", encoding="utf-8") as file:
        table_rows = list(csv.DictReader(file))
    assert [row["category"] for row in table_rows] == [row["category"] for row in rows]
    assert [row["rank"] for row in table_rows[:3]] == ["1", "2", "3"]
    with np.load(Path("maps", "[1] cat.npz")) as saved:
        assert json.loads(str(saved["metadata"]))["category"] in HOSTILE[1:4]
    write_atomically(Path("report.html"), f"<p>{NOT_UTF8}")
    assert Path("report.html").read_text(encoding="utf-8") == r"<p>caf\udce9.png"


def test_a_terminal_of_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on Windows, where redirected output is often in this encoding.
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    image = save_picture(tmp_path / "猫.png")
    assert run(["explain", str(image), *COUNTED, "--output", str(tmp_path / "out.png")]) == 0
    assert run(["explain", str(tmp_path / "犬.png"), *COUNTED]) == 2
    sys.stderr.flush()
    assert rb"\u72ac.png" in sys.stderr.buffer.getvalue()  # type: ignore[attr-defined]


def test_characters_that_no_font_has_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure()
    figure.suptitle("plain and \U000f0000猫")
    with monkeypatch.context() as patch:
        patch.setattr(fontManager, "ttflist", [])
        with pytest.warns(UserWarning, match="No installed font has .*猫"):
            drawing.render(figure, ".png")
    # Another font is asked for what the default one lacks.
    (font, *_) = [font for font in fontManager.ttflist if "STIX" in font.name]
    lacking = next(iter(drawing._characters(font.fname) - drawing._characters(findfont("DejaVu Sans"))))
    assert font.name in drawing._families({chr(lacking)})
