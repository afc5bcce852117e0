"""What follows from what one does on the page."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr
import pandas as pd

from captum_fusion._app.images import open_photograph
from captum_fusion._app.messages import one_line, reason
from captum_fusion._app.methods import parse_method
from captum_fusion._engine.progress import Progress, Stopped
from captum_fusion.explain import Explanation
from captum_fusion.page import _downloads as downloads
from captum_fusion.page import _panels as views
from captum_fusion.page._browser import Model, Run, Session, View
from captum_fusion.page._layout import MOST_CLASSES, Layout
from captum_fusion.page._recipe import recipe
from captum_fusion.page._samples import samples

_KNOWN = (OSError, RuntimeError, TypeError, ValueError)
_PROGRESS = gr.Progress()
_OVERLAY_MOVED = """strength => {
  window.captumFusionOverlay = strength;
  document.dispatchEvent(new Event("captum-fusion-overlay"));
}"""
# Gradio hears of what one does in any order, so the browser numbers it.
_NUMBERED = """(_, ...values) => {
  window.captumFusionActions = (window.captumFusionActions ?? 0) + 1;
  return [window.captumFusionActions, ...values];
}"""
# How often files of browsers are looked for, and how old they may be: each is read once, at once.
_FORGET_SECONDS = (30, 60)

Values = dict[Any, Any]
Take = Callable[[Session, Values, gr.EventData], None]
Work = Callable[[Run], Iterator[Values]]


class Page:
    """The page for some models, as Gradio's ``blocks``."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._samples = samples()
        self._sessions: WeakValueDictionary[str, Session] = WeakValueDictionary()
        with gr.Blocks(
            title="captum-fusion", analytics_enabled=False, delete_cache=_FORGET_SECONDS, fill_width=True
        ) as self.blocks:
            self._layout = Layout(list(models), self._samples)
            self._connect()

    def _connect(self) -> None:
        on = self._layout
        settings = {on.overlay, on.percentile, on.tolerance, on.weighting}
        inputs = {on.action, on.session, on.model, on.methods} | settings
        # Runs of one browser end each other, and browsers take turns with a model.
        handled: Any = {
            "inputs": inputs,
            "concurrency_limit": None,
            "trigger_mode": "multiple",
            "js": _NUMBERED,
            "api_visibility": "private",
        }
        at_once: Any = {"queue": False, "show_progress": "hidden"}
        runs = handled | {"show_progress_on": on.status}
        self._results = [on.maps, on.stages, on.agreement, on.code, on.insertion, on.deletion]
        explains = runs | {"outputs": [on.status, on.bars, on.classes, *self._results]}
        self.blocks.load(self._runs(self._explain, self._take_first), **explains)
        self.blocks.unload(self._leave)
        on.sample.choose(self._runs(self._explain, self._take_sample), **explains)
        on.upload.upload(self._runs(self._explain, self._take_upload), **explains | {"inputs": inputs | {on.upload}})
        # Room for the next one.
        on.upload.upload(lambda: None, outputs=[on.upload], api_visibility="private", **at_once)
        on.bars.choose(self._runs(self._explain, self._choose), **explains)
        on.bars.beside(self._runs(self._explain, self._choose_beside), **explains)
        on.classes.input(self._runs(self._explain, self._choose_typed), **explains | {"inputs": inputs | {on.classes}})
        for setting in (on.model, on.percentile, on.tolerance, on.weighting):
            setting.input(self._runs(self._explain), **explains)
        # What is typed in is no input to Gradio.
        on.methods.change(self._runs(self._explain), **explains)
        on.draw.click(self._runs(self._judge), **explains)
        on.stop.click(self._stop, **handled | at_once, outputs=[on.status, on.stages, on.agreement, on.code])
        on.overlay.input(None, [on.overlay], js=_OVERLAY_MOVED)
        on.overlay.change(self._write, **handled | at_once, outputs=[on.code])
        for button, made in (
            (on.get_picture, downloads.picture),
            (on.get_maps, downloads.maps),
            (on.get_python, downloads.python),
        ):
            button.click(self._gets(made), **runs, outputs=[on.status, on.download])

    def _runs(self, work: Work, take: Take | None = None) -> Callable[..., Iterator[Values]]:
        """A handler for what takes something in, then a while, can be stopped, and may go wrong.

        Gradio sends what a run yields as differences, which the browser may put into values that it has yet to show.
        So a value that is a dictionary there (a dropdown's choices, a curve) is followed by itself or by one that is
        none. When the run has ended, which may be when the next one has shown its own, Gradio shows its last values
        again, and empties everything if there were none. So the last ones leave everything as it is.
        """
        on = self._layout

        def run(
            values: Values, event: gr.EventData, request: gr.Request, progress: gr.Progress = _PROGRESS
        ) -> Iterator[Values]:
            def listener(heard: Progress) -> None:
                note = f", {heard.note}" if heard.note else ""
                progress((heard.done, heard.total), desc=f"{heard.description}{note} ", unit="passes")

            session, action = values[on.session], values[on.action]
            self._sessions[str(request.session_hash)] = session
            shown: Values = {}
            try:
                session.set(action, values)
                if take is not None:
                    take(session, values, event)
                # What a run shows is shown before the next one begins to.
                with suppress(Stopped), session.run(action, listener) as started:
                    yield {on.status: ""}
                    try:
                        for shown in work(started):
                            yield shown
                    except Exception as error:
                        # Nothing stays that may be of other settings.
                        shown = self._nothing(self._results) | {on.status: _sentence(error)}
                        yield shown
            except Exception as error:
                yield {on.status: _sentence(error)}
            curves = {curve: shown[curve] for curve in (on.insertion, on.deletion) if curve in shown}
            yield {on.status: gr.skip(), **curves}

        return run

    def _nothing(self, of: Sequence[Any]) -> Values:
        on = self._layout
        empty = {on.maps: views.NOTHING, on.stages: views.NOTHING, on.agreement: views.NOTHING, on.code: ""}
        return {component: empty.get(component) for component in of}

    def _leave(self, request: gr.Request) -> None:
        session = self._sessions.get(str(request.session_hash))
        if session is not None:
            session.stop(math.inf)

    def _take_first(self, session: Session, *_: object) -> None:
        session.look_at(self._samples[0].photograph, self._samples[0].python)

    def _take_sample(self, session: Session, _: Values, event: gr.EventData) -> None:
        sample = self._samples[event.index]
        session.look_at(sample.photograph, sample.python)

    def _take_upload(self, session: Session, values: Values, _: gr.EventData) -> None:
        file = Path(values[self._layout.upload])
        session.look_at(open_photograph(file, stranger=True), [repr(file.name)])

    def _choose(self, session: Session, values: Values, event: gr.EventData) -> None:
        session.choose(values[self._layout.model], [event.index])

    def _choose_beside(self, session: Session, values: Values, event: gr.EventData) -> None:
        model = values[self._layout.model]
        chosen = session.chosen(model) or []
        others = [index for index in chosen if index != event.index]
        session.choose(model, others if event.index in chosen else [*others[: MOST_CLASSES - 1], event.index])

    def _choose_typed(self, session: Session, values: Values, _: gr.EventData) -> None:
        session.choose(values[self._layout.model], values[self._layout.classes])

    def _explain(self, run: Run) -> Iterator[Values]:
        on, session, start = self._layout, run.session, perf_counter()
        values = session.settings
        model = self._models[values[on.model]]
        with run.step():
            picture, python = session.picture(values[on.model], model)
        prediction = picture.prediction
        targets = session.chosen(values[on.model])
        # What was chosen of the bars of another model may name nothing here.
        if targets is None or any(target >= len(prediction.probabilities) for target in targets):
            targets = [prediction.top(1)[0][0]]
            session.choose(values[on.model], targets)
        if session.listed is not picture:
            session.listed = picture
            yield {on.classes: gr.Dropdown(views.labelled(prediction), value=targets)}
        no_curves: Values = {on.insertion: None, on.deletion: None}
        yield {on.classes: targets, on.bars: views.bars(prediction, targets), **no_curves}
        methods = list(dict.fromkeys(parse_method(method).name for method in values[on.methods]))
        if not targets or not methods:
            raise ValueError("Choose a class and a method")
        made: dict[int, Explanation] = {}
        yield {on.maps: views.maps(prediction, targets, made, methods), **no_curves}
        for upto in range(1, len(methods) + 1):
            for target in targets:
                with run.step():
                    made[target] = picture.explain(
                        target,
                        methods[:upto],
                        percentile=values[on.percentile],
                        weighting=values[on.weighting],
                        tolerance=values[on.tolerance],
                        show_progress=True,
                    )
                yield {on.maps: views.maps(prediction, targets, made, methods), **no_curves}
        run.check()
        shown = session.shown = View(picture, list(made.values()), model.arguments, python)
        notes = dict.fromkeys(note for explanation in shown.explanations for note in explanation.notes)
        done = f"{prediction.model}, layer {prediction.feature_map}, in {perf_counter() - start:.1f} s"
        yield {
            on.status: ". ".join([done, *notes]),
            on.stages: views.stages(shown.explanations),
            on.agreement: views.agreement(shown.explanations),
            # The overlay is no business of runs, and may have been moved meanwhile.
            on.code: recipe(shown, session.settings[on.overlay]),
        }

    def _judge(self, run: Run) -> Iterator[Values]:
        # Ends what was running for the maps, so that this finishes it.
        yield from self._explain(run)
        on, start, shown = self._layout, perf_counter(), run.session.shown
        assert shown is not None
        insertions, deletions = [], []
        yield {on.status: ""}
        for explanation in shown.explanations:
            for name in explanation.maps:
                with run.step():
                    curves = shown.picture.curves(explanation, name, show_progress=True)
                label = name if len(shown.explanations) == 1 else f"{explanation.category}, {name}"
                insertions.append(views.curve(label, curves.insertion))
                deletions.append(views.curve(label, curves.deletion))
        # All at once: a plot that is drawn takes no notice of further curves.
        yield {
            on.status: f"{len(insertions)} maps judged, in {perf_counter() - start:.1f} s",
            on.insertion: pd.concat(insertions),
            on.deletion: pd.concat(deletions),
        }

    def _stop(self, values: Values) -> Values:
        on, session = self._layout, values[self._layout.session]
        session.stop(values[on.action])
        # What was shown before belongs to other maps than those that were begun.
        of_before = [on.stages, on.agreement, on.code] if session.shown is None else []
        return {on.status: "Stopped.", **self._nothing(of_before)}

    def _write(self, values: Values) -> Values:
        session, overlay = values[self._layout.session], values[self._layout.overlay]
        session.set(values[self._layout.action], values)
        return {self._layout.code: recipe(session.shown, overlay) if session.shown else gr.skip()}

    def _gets(self, made: Callable[[View, float], tuple[str, bytes]]) -> Callable[[Values], Values]:
        def get(values: Values) -> Values:
            shown = values[self._layout.session].shown
            if shown is None:
                return {self._layout.status: "There is nothing to download yet."}
            return {self._layout.download: views.download(*made(shown, values[self._layout.overlay]))}

        return get


def _sentence(error: Exception) -> str:
    return one_line(error) if isinstance(error, _KNOWN) else reason(error)
