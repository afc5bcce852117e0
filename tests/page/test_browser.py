"""Tabs and their runs."""

import gc
import weakref
from contextlib import suppress
from threading import Thread, Timer
from threading import enumerate as enumerate_threads
from time import sleep

import pytest
import torch
from PIL import Image

from captum_fusion._app.images import Photograph
from captum_fusion._engine.progress import Progress, Stopped, tell
from captum_fusion.explain import Explainer
from captum_fusion.page import _browser
from captum_fusion.page._browser import Model, Run, Tab, Tabs
from tests.conftest import SmallNet

MODEL = Model(Explainer(torch.nn.Identity()), {})


def test_a_newer_run_ends_the_older_and_begins_when_that_has_ended() -> None:
    tab, heard, order = Tab(), [], []

    def renew() -> None:
        with tab.run(2, heard.append) as newer, newer.step(MODEL):
            order.append("newer")

    thread = Thread(target=renew)

    def go_on(older: Run) -> None:
        thread.start()
        while True:
            with older.step(MODEL):
                order.append("older")
                sleep(0.01)

    with tab.run(1, heard.append) as older:
        with older.step(MODEL):
            tell(Progress("Passes", 1, 2))
        assert heard == [Progress("Passes", 1, 2)]
        with pytest.raises(Stopped):
            go_on(older)
    thread.join()
    assert order[-1] == "newer"
    assert order.count("newer") == 1


def test_a_tab_that_waits_for_the_model_can_be_stopped() -> None:
    tab, heard = Tab(), []

    def hear(progress: Progress) -> None:
        heard.append(progress.description)
        tab.stop()

    with MODEL.turn, tab.run(1, hear) as run, pytest.raises(Stopped), run.step(MODEL):
        pass
    assert heard == ["Waiting for another tab"]
    assert not MODEL.turn.locked()


def test_a_run_is_stopped_between_passes() -> None:
    tab = Tab()
    with suppress(Stopped), tab.run(1, lambda _: None) as run, run.step(MODEL):
        tab.stop(2)
        with pytest.raises(Stopped):
            tell(Progress("Passes", 1, 2))


def test_of_those_that_wait_the_newest_goes_on() -> None:
    tab, went = Tab(), []

    def wait(number: int) -> None:
        with suppress(Stopped), tab.run(number, lambda _: None):
            went.append(number)

    with tab.run(0, lambda _: None):
        threads = [Thread(target=wait, args=(number,)) for number in range(1, 6)]
        for thread in threads:
            thread.start()
            sleep(0.02)
    for thread in threads:
        thread.join()
    assert went == [5]


def test_tabs_do_not_end_each_other() -> None:
    first, second = Tab(), Tab()
    with first.run(1, lambda _: None) as run, second.run(2, lambda _: None), run.step(MODEL):
        pass


def test_a_photograph_is_opened_once_for_each_model(net: SmallNet) -> None:
    tab = Tab()
    models = {name: Model(Explainer(net, size=size), {"model": name}) for name, size in (("small", 24), ("large", 30))}
    with pytest.raises(ValueError, match="There is no photograph yet"):
        tab.image("small", models)
    tab.look_at(Photograph(Image.new("RGB", (30, 40), "teal")), ["image"])
    image, python = tab.image("small", models)
    assert tab.image("small", models)[0] is image
    assert python == ["image"]
    tab.look_at(Photograph(Image.new("RGB", (30, 40), "navy")), ["other"])
    assert tab.image("small", models)[0] is not image


def test_what_a_later_action_stops_does_not_begin() -> None:
    tab = Tab()
    tab.stop(2)
    with pytest.raises(Stopped), tab.run(1, lambda _: None):
        pass
    with tab.run(3, lambda _: None):
        pass


def test_the_settings_are_those_of_the_latest_action_in_whatever_order_they_arrive() -> None:
    tab = Tab()
    for action in (2, 3, 1):
        tab.set(action, f"settings {action}")
    assert tab.settings == "settings 3"


def test_classes_are_those_of_one_model_and_photograph() -> None:
    tab = Tab()
    tab.choose("small", [1, 2])
    assert tab.targets("small") == [1, 2]
    assert tab.targets("large") is None
    tab.look_at(Photograph(Image.new("RGB", (30, 40), "navy")), ["image"])
    assert tab.targets("small") is None


def test_a_photograph_is_dropped_once_every_model_has_its_own_copy(net: SmallNet) -> None:
    tab, image = Tab(), Image.new("RGB", (30, 40), "teal")
    models = {name: Model(Explainer(net, size=size), {"model": name}) for name, size in (("small", 24), ("large", 30))}
    alive = weakref.ref(image)
    tab.look_at(Photograph(image), ["image"])
    del image
    tab.image("small", models)
    assert alive() is not None
    image = tab.image("large", models)[0]
    gc.collect()
    assert alive() is None
    assert tab.image("large", models)[0] is image
    assert not tab.is_empty


def test_a_closed_tab_is_forgotten_and_a_reloaded_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_browser, "_RELOAD_SECONDS", 0.0)
    tabs = Tabs()
    closed, reloaded = tabs.connect("closed", "1"), tabs.connect("reloaded", "2")
    assert tabs.connect("reloaded", "3") is reloaded
    for connection in ("1", "2"):
        tabs.disconnect(connection)
    for thread in enumerate_threads():
        if isinstance(thread, Timer):
            thread.join()
    assert len(tabs) == 1
    assert tabs.connect("reloaded", "4") is reloaded
    # What ran for the closed one has ended.
    with pytest.raises(Stopped), closed.run(99, lambda _: None):
        pass
