"""The command that serves the page."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from captum_fusion import cli, page

SMALL = ["page", "--model", "tests.page.conftest:small_net", "--size", "24"]


def test_it_serves_this_machine_alone_and_keeps_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "captum_fusion", *SMALL]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("The page is at http://127.0.0.1:")
        address = line.split()[4]
        with urlopen(address) as answer:
            assert answer.status == 200
        # Another address of this machine, where it would answer if it listened on all interfaces.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", urlsplit(address).port or 0), timeout=600)
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../a.png"\r\n\r\npicture\r\n--x--\r\n'
        )
        sent = Request(f"{address}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
        with urlopen(sent) as answer:
            assert answer.status == 200
        (file,) = tmp_path.rglob("a.png")
        assert file.is_relative_to(next(tmp_path.glob("captum-fusion-*")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0
    assert list(tmp_path.glob("captum-fusion-*")) == []


def test_a_terminal_that_closes_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(page, "load_models", lambda _: {})
    monkeypatch.setattr(page, "serving", lambda *_: nullcontext("http://127.0.0.1"))
    event = SimpleNamespace(wait=lambda: signal.raise_signal(signal.SIGHUP))
    monkeypatch.setattr(cli, "threading", SimpleNamespace(Event=lambda: event))
    try:
        assert cli.run(SMALL) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.run([*SMALL, "--port", str(port)]) == cli.REFUSED
    assert f"The page cannot be served at 127.0.0.1, port {port}" in capsys.readouterr().err


def test_wrong_models_are_refused_before_gradio_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_events", "_layout"):
        monkeypatch.setitem(sys.modules, f"captum_fusion.page.{name}", None)
    for arguments, message in (
        (["resnet18", "resnet34", "resnet50", "--weights", "none", "a.pt"], "2 weights were given for 3 models"),
        (["resnet81"], "Unknown torchvision classifier 'resnet81'"),
    ):
        assert cli.run(["page", "--model", *arguments]) == cli.REFUSED
        assert message in capsys.readouterr().err


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("captum_fusion.page")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.run(SMALL) == cli.REFUSED
    assert "The page needs the package gradio: pip install '.[page]'" in capsys.readouterr().err
