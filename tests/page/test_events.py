"""The page in a browser."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from captum.attr import visualization
from PIL import Image
from playwright.sync_api import Page, expect

from captum_fusion._app.methods import METHODS
from captum_fusion.page._browser import Model
from tests.page.conftest import PATIENCE, Gated, status

Visit = Callable[[], Page]


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A picture with a hostile name."""
    file = tmp_path / "a 'quoted' ü(x)[1].png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(file)
    return file


def upload(page: Page, file: Path) -> None:
    page.locator("#upload input[type=file]").set_input_files(file)


def names(page: Page) -> list[str]:
    """The maps that are shown."""
    return page.locator(".maps:visible figcaption strong").all_text_contents()


def drawn(page: Page, name: str) -> str:
    """The painted pixels of a map."""
    painted: str = (
        page.locator(".maps:visible .panel", has=page.get_by_text(name, exact=True))
        .locator("canvas")
        .first.evaluate("canvas => canvas.toDataURL()")
    )
    return painted


def change(page: Page, name: str, action: Callable[[], object]) -> None:
    """Runs an action that changes a map, and waits until the map is drawn."""
    before = drawn(page, name)
    action()
    for _ in range(PATIENCE // 100):
        if drawn(page, name) != before:
            break
        page.wait_for_timeout(100)
    settle(page)
    assert drawn(page, name) != before


def choose(page: Page, label: str, *options: str) -> None:
    """Chooses in a list by typing."""
    for option in options:
        page.get_by_label(label).fill(option)
        page.get_by_role("option", name=option, exact=True).click()


def settle(page: Page) -> None:
    """Waits until no work runs."""
    expect(status(page)).not_to_be_empty()
    expect(page.locator(".pending")).to_have_count(0)


def visit_gated(visit: Visit) -> Page:
    """The page with the model whose passes can be held."""
    page = visit()
    settle(page)
    choose(page, "Model", "gated")
    expect(status(page)).to_contain_text("600 channels")
    settle(page)
    return page


def downloaded(page: Page, what: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=f"Download {what}").click()
    file = folder / waiting.value.suggested_filename
    waiting.value.save_as(file)
    return file


def test_a_sample_is_explained_at_once_and_another_on_a_click(visit: Visit) -> None:
    page = visit()
    settle(page)
    assert names(page) == ["photograph", "grad-cam", "score-cam", "fusion-cam"]
    assert page.locator(".bar").count() == 3
    change(page, "fusion-cam", lambda: page.locator(".sample").nth(1).click())


def test_a_map_follows_what_one_chooses(visit: Visit) -> None:
    page = visit()
    settle(page)
    grad_cam = drawn(page, "grad-cam")
    change(page, "fusion-cam", lambda: page.get_by_label("number input for Percentile").fill("80"))
    change(page, "fusion-cam", lambda: page.get_by_label("normalized", exact=True).check())
    # Others do not depend on these.
    assert drawn(page, "grad-cam") == grad_cam
    change(page, "grad-cam", lambda: page.get_by_label("number input for Overlay").fill("0.2"))
    change(page, "grad-cam", lambda: page.locator(".bar .name").nth(2).click())
    expect(page.locator(".bar.chosen")).to_have_count(1)


def test_pointing_shows_the_values_of_all_maps(visit: Visit, models: dict[str, Model]) -> None:
    page = visit()
    settle(page)
    canvas = page.locator(".maps:visible canvas").first
    box: Any = canvas.bounding_box()
    # The middle of the pixel in row 30 and column 10 of 48.
    canvas.hover(position={"x": box["width"] * 10.5 / 48, "y": box["height"] * 30.5 / 48})
    explainer = models["small"].explainer
    explanation = explainer.open().explain(methods=["grad-cam", "score-cam", "fusion-cam"], tolerance=0.05)
    values = [f"{values[0, 0, 30, 10].item():.3f}" for values in explanation.maps.values()]
    assert page.locator(".value:visible").all_text_contents() == values
    canvas.focus()
    page.keyboard.press("ArrowRight")
    values = [f"{values[0, 0, 30, 11].item():.3f}" for values in explanation.maps.values()]
    assert page.locator(".value:visible").all_text_contents() == values


def test_two_classes_with_what_one_takes_away(
    visit: Visit, photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit()
    settle(page)
    change(page, "photograph", lambda: upload(page, photograph))
    page.locator(".beside").nth(2).click()
    expect(page.locator(".maps:visible section")).to_have_count(2)
    settle(page)
    targets = [int(text) for text in page.locator(".bar.chosen .text").all_text_contents()]
    assert len(targets) == 2
    page.get_by_label("number input for Percentile").fill("40")
    change(page, "fusion-cam", lambda: page.get_by_label("released", exact=True).check())
    page.get_by_role("tab", name="Python").click()
    expect(page.locator(".cm-content")).to_contain_text("percentile=40, weighting='released'")

    folder = tmp_path / "downloads"
    folder.mkdir()
    with Image.open(downloaded(page, "picture", folder)) as picture:
        assert picture.width > 500
    with zipfile.ZipFile(downloaded(page, "maps", folder)) as archive:
        maps = {name: np.load(io.BytesIO(archive.read(name))) for name in archive.namelist()}
    code = downloaded(page, "Python", folder).read_text()
    assert len([line for line in code.splitlines() if line]) <= 12

    painted = []
    monkeypatch.setattr(
        visualization,
        "visualize_image_attr",
        lambda heat, photograph, *_, title, **__: painted.append((title, heat[..., 0], photograph)),
    )
    monkeypatch.chdir(photograph.parent)
    exec(compile(code, "explained.py", "exec"), {})
    shown = {json.loads(str(saved["metadata"]))["target"]: saved for saved in maps.values()}
    assert sorted(shown) == sorted(targets)
    expected = [(name, shown[target]) for target in targets for name in ("grad-cam", "score-cam", "fusion-cam")]
    assert [title for title, _, _ in painted] == [name for name, _ in expected]
    for (name, heat, pixels), (_, saved) in zip(painted, expected, strict=True):
        np.testing.assert_array_equal(heat, saved[name])
        np.testing.assert_array_equal(pixels, saved["pixels"].transpose(1, 2, 0))


def test_classes_and_methods_are_typed(visit: Visit) -> None:
    page = visit()
    settle(page)
    choose(page, "Methods", "hi-res-cam")
    expect(page.locator(".maps:visible .panel")).to_have_count(5)
    settle(page)
    assert names(page)[-1] == "hi-res-cam"
    page.get_by_label("Methods").fill("fusion(x-grad-cam, group-cam)")
    page.keyboard.press("Enter")
    expect(page.locator(".maps:visible .panel")).to_have_count(6)
    settle(page)
    page.get_by_label("Methods").fill("scoer-cam")
    page.keyboard.press("Enter")
    expect(status(page)).to_contain_text("scoer-cam")
    expect(status(page)).to_contain_text("score-cam")
    # The maps stay, and the page goes on.
    assert len(names(page)) == 6
    other = page.locator(".bar:not(.chosen) .text").first.text_content()
    choose(page, "Classes", str(other))
    expect(status(page)).to_contain_text("scoer-cam")


def test_every_method_is_offered(visit: Visit) -> None:
    page = visit()
    page.get_by_label("Methods").click()
    expect(page.get_by_role("option")).to_have_count(len(METHODS))


def test_stages_agreement_and_curves(visit: Visit) -> None:
    page = visit()
    settle(page)
    page.get_by_role("tab", name="Stages").click()
    expect(page.locator(".maps:visible canvas")).to_have_count(6)
    assert names(page)[1:] == ["G: grad-cam", "D: denoised", "R: score-cam", "C: combined", "fusion-cam"]
    assert all("contributes" in text for text in page.locator(".maps:visible figcaption").all_text_contents()[2:5])
    page.get_by_role("tab", name="Agreement").click()
    expect(page.locator(".maps:visible canvas")).to_have_count(4)
    page.locator(".maps:visible canvas").first.hover()
    assert "|" in page.locator(".value:visible").last.text_content()
    page.get_by_role("tab", name="Curves").click()
    expect(page.locator(".vega-embed:visible")).to_have_count(2)
    settle(page)
    page.get_by_role("tab", name="Maps").click()
    change(page, "fusion-cam", lambda: page.get_by_label("number input for Percentile").fill("70"))


def test_stop_stops_between_passes(visit: Visit, gated: Gated) -> None:
    page = visit_gated(visit)
    gated.gate.clear()
    gated.rows = 0
    page.get_by_label("number input for Tolerance").fill("0")
    expect(page.locator(".pending")).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    expect(status(page)).to_have_text("Stopped.")
    gated.gate.set()
    page.get_by_label("number input for Tolerance").fill("0.05")
    expect(status(page)).to_contain_text("600 channels")
    settle(page)
    # All channels would have been 600 rows and more.
    assert gated.rows < 500
    assert not any(module._forward_hooks for module in gated.modules())


def test_the_curves_of_all_maps_are_drawn_however_long_they_take(visit: Visit, gated: Gated) -> None:
    page = visit_gated(visit)
    gated.seconds = 0.1
    page.get_by_role("tab", name="Curves").click()
    expect(status(page)).to_contain_text("3 maps judged")
    expect(page.locator(".vega-embed:visible")).to_have_count(2)
    for plot in page.locator(".vega-embed:visible").all():
        for name in ("grad-cam", "score-cam", "fusion-cam"):
            expect(plot).to_contain_text(f"{name}: 0.")
    # They follow a setting while their tab is open, and stay while another one is.
    gated.seconds = 0
    page.get_by_label("number input for Percentile").fill("80")
    expect(status(page)).to_be_empty()
    expect(status(page)).to_contain_text("3 maps judged")
    gated.rows = 0
    page.get_by_role("tab", name="Python").click()
    page.get_by_role("tab", name="Curves").click()
    expect(page.locator(".vega-embed:visible")).to_have_count(2)
    assert gated.rows == 0


def test_a_picture_that_cannot_be_explained_is_a_sentence(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (tmp_path / "drawing.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (1, 300)).save(tmp_path / "long.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "![x](http:--127.0.0.2-x) <img src=x>.png")
    page = visit()
    settle(page)
    for name, message in (
        ("broken.png", "broken.png cannot be read"),
        ("drawing.jpg", "it is not an image in a supported format"),
        ("long.png", "long.png cannot be explained: it has 1 x 300 pixels"),
        ("![x](http:--127.0.0.2-x) <img src=x>.png", "9000 x 9000 pixels; expected at most 50 million"),
    ):
        upload(page, tmp_path / name)
        expect(status(page)).to_contain_text(message)
    page.locator(".sample").nth(3).click()
    expect(page.locator(".maps:visible canvas")).to_have_count(4)
    settle(page)


def test_odd_pictures(visit: Visit, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), "teal").save(tmp_path / "tiny.png")
    Image.new("CMYK", (50, 40), (10, 200, 30, 40)).save(tmp_path / "print.jpg")
    frames = [Image.new("P", (30, 30), shade) for shade in (9, 99)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    page = visit()
    settle(page)
    for name in ("tiny.png", "print.jpg", "moving.gif"):
        change(page, "photograph", lambda name=name: upload(page, tmp_path / name))


def test_two_browsers_get_their_own(visit: Visit, photograph: Path) -> None:
    first, second = visit(), visit()
    for page in (first, second):
        settle(page)
    shown = drawn(second, "fusion-cam")
    change(first, "photograph", lambda: upload(first, photograph))
    assert drawn(first, "fusion-cam") != shown
    assert drawn(second, "fusion-cam") == shown
    second.get_by_label("number input for Percentile").fill("50")
    first.locator(".beside").nth(1).click()
    expect(first.locator(".maps:visible section")).to_have_count(2)
    settle(first)
    settle(second)
    assert second.locator(".maps:visible section").count() == 1


def test_sliders_that_are_moved_quickly(visit: Visit) -> None:
    page = visit()
    settle(page)
    number = page.get_by_label("number input for Percentile")
    for value in (5, 90, 20, 70, 33):
        number.fill(str(value))
    page.get_by_role("tab", name="Python").click()
    expect(page.locator(".cm-content")).to_contain_text("percentile=33")
    settle(page)


def test_nothing_is_lost_to_what_one_does_next(visit: Visit, gated: Gated) -> None:
    page = visit_gated(visit)
    percentile, code = page.get_by_label("number input for Percentile"), page.locator(".cm-content")
    # Another photograph and two classes in turn, each before what follows has begun.
    gated.gate.clear()
    page.get_by_label("number input for Tolerance").fill("0.01")
    expect(page.locator(".pending")).to_have_count(2)
    page.locator(".sample").nth(1).click()
    percentile.fill("40")
    gated.gate.set()
    page.get_by_role("tab", name="Python").click()
    expect(code).to_contain_text("percentile=40")
    expect(code).to_contain_text("chelsea")
    settle(page)
    page.get_by_role("tab", name="Maps").click()
    other = page.locator(".bar .text").nth(1).text_content()
    gated.gate.clear()
    page.get_by_label("number input for Tolerance").fill("0.02")
    page.locator(".beside").nth(1).click()
    page.locator(".beside").nth(0).click()
    gated.gate.set()
    expect(page.locator(".maps:visible h2")).to_have_count(1)
    expect(page.locator(".maps:visible h2")).to_contain_text(str(other))
    settle(page)
    # Another model, whose classes are others.
    choose(page, "Model", "small")
    percentile.fill("30")
    page.get_by_role("tab", name="Python").click()
    expect(code).to_contain_text("percentile=30")
    expect(code).to_contain_text("small_net")
    settle(page)
    assert page.locator(".bar.chosen .text").all_text_contents() == [page.locator(".bar .text").first.text_content()]


def test_what_is_stopped_shows_nothing_of_before(visit: Visit, gated: Gated) -> None:
    page = visit_gated(visit)
    gated.gate.clear()
    page.get_by_label("number input for Tolerance").fill("0.03")
    expect(page.locator(".pending")).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    expect(status(page)).to_have_text("Stopped.")
    gated.gate.set()
    page.get_by_role("tab", name="Python").click()
    expect(page.locator(".cm-content", has_text="Explainer")).to_have_count(0)
    page.get_by_role("button", name="Download Python").click()
    expect(status(page)).to_have_text("There is nothing to download yet.")


def test_no_path_reaches_the_file_system(visit: Visit, address: str) -> None:
    page = visit()
    secret = Path(__file__)
    for path in (secret, "/etc/passwd", os.path.relpath(secret, "/tmp")):
        answer = page.request.get(f"{address}gradio_api/file={path}")
        assert answer.status in (403, 404)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_has_no_accessibility_violations(scheme: Any, visit: Visit) -> None:
    page = visit()
    page.emulate_media(color_scheme=scheme)
    # Loaded again, since the colours fade from one scheme to the other.
    page.reload()
    expect(status(page)).to_contain_text(" in ")
    settle(page)
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_a_narrow_screen_shows_maps_and_all_tabs_first(visit: Visit) -> None:
    page = visit()
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    settle(page)
    for name in ("Maps", "Stages", "Agreement", "Curves", "Python"):
        expect(page.get_by_role("tab", name=name)).to_be_in_viewport()
    expect(page.locator(".maps:visible canvas").first).to_be_in_viewport()


def test_a_reload_keeps_photograph_settings_and_classes(visit: Visit) -> None:
    page = visit()
    settle(page)
    change(page, "photograph", lambda: page.locator(".sample").nth(1).click())
    change(page, "fusion-cam", lambda: page.get_by_label("number input for Percentile").fill("80"))
    change(page, "grad-cam", lambda: page.locator(".bar .name").nth(1).click())
    before = [drawn(page, name) for name in ("photograph", "grad-cam", "fusion-cam")]
    page.reload()
    expect(status(page)).to_contain_text(" in ")
    settle(page)
    assert [drawn(page, name) for name in ("photograph", "grad-cam", "fusion-cam")] == before
    expect(page.get_by_label("number input for Percentile")).to_have_value("80")


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        (None, None, 200),
        (None, "http://{own}", 200),
        # A untrusted's name that leads here, and requests of a untrusted's page.
        ("example.org:{port}", None, 400),
        (None, "http://example.org", 403),
        (None, "null", 403),
    ],
)
def test_answers_its_own_address_only(host: str | None, origin: str | None, status: int, address: str) -> None:
    own = urlsplit(address)
    headers = {"Host": (host or own.netloc).format(port=own.port)}
    if origin is not None:
        headers["Origin"] = origin.format(own=own.netloc)
    connection = HTTPConnection(str(own.hostname), own.port, timeout=PATIENCE / 1000)
    connection.request("GET", "/", headers=headers)
    response = connection.getresponse()
    assert response.status == status
    assert status != 200 or response.getheader("Content-Security-Policy") == "frame-ancestors 'none'"
