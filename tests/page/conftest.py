"""A server with small models, and a browser."""

import shutil
from collections.abc import Iterator
from threading import Event
from time import sleep
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright
from torch import Tensor

from captum_fusion.explain import Explainer
from captum_fusion.page import serving
from captum_fusion.page._browser import Model
from tests.conftest import SmallNet

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
)
# Small networks take no time, but the machine may be busy: five minutes, in milliseconds.
PATIENCE = 300_000


class Gated(SmallNet):
    """A network whose passes wait while its gate is closed, and may take a while."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(channels=600)
        self.gate = Event()
        self.gate.set()
        self.rows = 0
        self.seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        assert self.gate.wait(PATIENCE / 1000)
        sleep(self.seconds)
        return super().forward(x)


def small_net() -> SmallNet:
    torch.manual_seed(3)
    return SmallNet()


@pytest.fixture(scope="session")
def gated() -> Gated:
    return Gated()


@pytest.fixture(scope="session")
def models(gated: Gated) -> dict[str, Model]:
    small: dict[str, Any] = {"model": "tests.page.conftest:small_net", "size": 48}
    return {
        "small": Model(Explainer(**small), small),
        "gated": Model(Explainer(gated, layer="features", size=24), {"model": "gated"}),
    }


@pytest.fixture(scope="session")
def address(models: dict[str, Model]) -> Iterator[str]:
    with serving(models, "127.0.0.1", None) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium to test the page in; CONTRIBUTING.md says how to get one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS.split())
        expect.set_options(timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, address: str, gated: Gated) -> Iterator[Any]:
    """Opens the page in a browser of its own; it must ask nobody else for anything, and fail at nothing."""
    wrong: list[str] = []
    contexts = []

    def open_page() -> Page:
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        # Gradio's plots leave observers of their width behind, which fail when a plot is emptied.
        page.on("pageerror", lambda error: None if "'offsetWidth'" in str(error) else wrong.append(str(error)))
        page.on("request", lambda request: None if _is_local(request.url, address) else wrong.append(request.url))
        page.goto(address)
        expect(status(page)).to_contain_text(" in ")
        return page

    yield open_page
    gated.gate.set()
    gated.seconds = 0
    for context in contexts:
        context.close()
    assert wrong == []


def _is_local(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def status(page: Page) -> Any:
    """The status of the page."""
    return page.get_by_role("status").first
