"""What one browser looks at."""

from contextlib import suppress
from copy import deepcopy
from threading import Thread
from time import sleep

import pytest
from PIL import Image

from captum_fusion._app.images import Photograph
from captum_fusion._engine.progress import Progress, Stopped, tell
from captum_fusion.explain import Explainer
from captum_fusion.page._browser import Model, Run, Session
from tests.conftest import SmallNet


def test_a_newer_run_ends_the_older_and_begins_when_that_has_ended() -> None:
    session, heard, order = Session(), [], []

    def renew() -> None:
        with session.run(2, heard.append) as newer, newer.step():
            order.append("newer")

    thread = Thread(target=renew)

    def go_on(older: Run) -> None:
        thread.start()
        while True:
            with older.step():
                order.append("older")
                sleep(0.01)

    with session.run(1, heard.append) as older:
        with older.step():
            tell(Progress("Passes", 1, 2))
        assert heard == [Progress("Passes", 1, 2)]
        with pytest.raises(Stopped):
            go_on(older)
    thread.join()
    assert order[-1] == "newer"
    assert order.count("newer") == 1


def test_a_run_is_stopped_between_passes() -> None:
    session = Session()
    with suppress(Stopped), session.run(1, lambda _: None) as run, run.step():
        session.stop(2)
        with pytest.raises(Stopped):
            tell(Progress("Passes", 1, 2))


def test_of_those_that_wait_the_newest_goes_on() -> None:
    session, went = Session(), []

    def wait(number: int) -> None:
        with suppress(Stopped), session.run(number, lambda _: None):
            went.append(number)

    with session.run(0, lambda _: None):
        threads = [Thread(target=wait, args=(number,)) for number in range(1, 6)]
        for thread in threads:
            thread.start()
            sleep(0.02)
    for thread in threads:
        thread.join()
    assert went == [5]


def test_browsers_do_not_end_each_other() -> None:
    first = Session()
    second = deepcopy(first)
    with first.run(1, lambda _: None) as run, second.run(2, lambda _: None), run.step():
        pass


def test_a_photograph_is_opened_once_for_each_model(net: SmallNet) -> None:
    session, model = Session(), Model(Explainer(net, size=24), {"model": "small"})
    with pytest.raises(ValueError, match="There is no photograph yet"):
        session.picture("small", model)
    session.look_at(Photograph(Image.new("RGB", (30, 40), "teal")), ["image"])
    picture, python = session.picture("small", model)
    assert session.picture("small", model)[0] is picture
    assert python == ["image"]
    session.look_at(Photograph(Image.new("RGB", (30, 40), "navy")), ["other"])
    assert session.picture("small", model)[0] is not picture


def test_what_a_later_action_stops_does_not_begin() -> None:
    session = Session()
    session.stop(2)
    with pytest.raises(Stopped), session.run(1, lambda _: None):
        pass
    with session.run(3, lambda _: None):
        pass


def test_the_settings_are_those_of_the_latest_action_in_whatever_order_they_arrive() -> None:
    session = Session()
    for action in (2, 3, 1):
        session.set(action, f"settings {action}")
    assert session.settings == "settings 3"


def test_classes_are_those_of_one_model_and_photograph() -> None:
    session = Session()
    session.choose("small", [1, 2])
    assert session.chosen("small") == [1, 2]
    assert session.chosen("large") is None
    session.look_at(Photograph(Image.new("RGB", (30, 40), "navy")), ["image"])
    assert session.chosen("small") is None
