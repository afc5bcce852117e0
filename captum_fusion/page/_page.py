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

from captum_fusion._methods import parse_method
from captum_fusion._names import one_line, reason
from captum_fusion._photograph import Photograph, open_photograph
from captum_fusion._progress import Progress, Stopped
from captum_fusion.explain import Explanation, OpenedPicture
from captum_fusion.page import _downloads as downloads
from captum_fusion.page import _views as views
from captum_fusion.page._layout import MOST_CLASSES, Layout
from captum_fusion.page._recipe import recipe
from captum_fusion.page._samples import samples
from captum_fusion.page._session import Model, Run, Session

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
Work = Callable[[Run, Values, gr.EventData], Iterator[Values]]


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
        # Runs of one browser end each other, and browsers take turns with a model.
        handled: Any = {
            "inputs": {on.action, on.session, on.upload, on.model, on.classes, on.methods} | settings,
            "concurrency_limit": None,
            "trigger_mode": "multiple",
            "js": _NUMBERED,
            "api_visibility": "private",
        }
        runs = handled | {"show_progress_on": on.status}
        views_of_run = [on.upload, on.status, on.bars, on.classes, on.maps, on.stages, on.agreement, on.code]
        explains = runs | {"outputs": [*views_of_run, on.insertion, on.deletion]}
        self.blocks.load(self._runs(self._look_at_first), **explains)
        self.blocks.unload(self._leave)
        on.sample.choose(self._runs(self._look_at_sample), **explains)
        on.upload.upload(self._runs(self._look_at_upload), **explains)
        on.model.input(self._runs(self._predict), **explains)
        on.bars.choose(self._runs(self._choose), **explains)
        on.bars.beside(self._runs(self._choose_beside), **explains)
        for setting in (on.classes, on.percentile, on.tolerance, on.weighting):
            setting.input(self._runs(self._explain), **explains)
        # What is typed in is no input to Gradio.
        on.methods.change(self._runs(self._explain), **explains)
        on.draw.click(self._runs(self._judge), **explains)
        at_once = handled | {"queue": False, "show_progress": "hidden"}
        on.stop.click(self._stop, **at_once, outputs=[on.status])
        on.overlay.input(None, [on.overlay], js=_OVERLAY_MOVED)
        on.overlay.change(self._write, **at_once, outputs=[on.code])
        for button, made in (
            (on.get_picture, downloads.picture),
            (on.get_maps, downloads.maps),
            (on.get_python, downloads.python),
        ):
            button.click(self._gets(made), **runs, outputs=[on.status, on.download])

    def _runs(self, work: Work) -> Callable[..., Iterator[Values]]:
        """A handler for what takes a while, can be stopped, and may go wrong.

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

            session = self._sessions[str(request.session_hash)] = values[on.session]
            shown: Values = {}
            # What a run shows is shown before the next one begins to.
            with suppress(Stopped), session.run(values[on.action], listener) as started:
                yield {on.status: ""}
                try:
                    for shown in work(started, values, event):
                        yield shown
                except Exception as error:
                    yield {on.status: one_line(error) if isinstance(error, _KNOWN) else reason(error)}
            curves = {curve: shown[curve] for curve in (on.insertion, on.deletion) if curve in shown}
            yield {on.status: gr.skip(), **curves}

        return run

    def _leave(self, request: gr.Request) -> None:
        session = self._sessions.get(str(request.session_hash))
        if session is not None:
            session.stop(math.inf)

    def _look_at_first(self, run: Run, values: Values, event: gr.EventData) -> Iterator[Values]:
        return self._look_at(self._samples[0].photograph, self._samples[0].python, run, values, event)

    def _look_at_sample(self, run: Run, values: Values, event: gr.EventData) -> Iterator[Values]:
        sample = self._samples[event.index]
        return self._look_at(sample.photograph, sample.python, run, values, event)

    def _look_at_upload(self, run: Run, values: Values, event: gr.EventData) -> Iterator[Values]:
        file = Path(values[self._layout.upload])
        # Room for the next one.
        yield {self._layout.upload: None}
        yield from self._look_at(open_photograph(file, stranger=True), [repr(file.name)], run, values, event)

    def _look_at(
        self, photograph: Photograph, python: Sequence[str], run: Run, values: Values, event: gr.EventData
    ) -> Iterator[Values]:
        run.session.look_at(photograph, python)
        yield from self._predict(run, values, event)

    def _predict(self, run: Run, values: Values, event: gr.EventData) -> Iterator[Values]:
        prediction = self._picture(run, values).prediction
        top = [prediction.top(1)[0][0]]
        yield {self._layout.classes: gr.Dropdown(views.labelled(prediction), value=top)}
        yield from self._explain(run, values | {self._layout.classes: top}, event)

    def _choose(self, run: Run, values: Values, event: gr.EventData) -> Iterator[Values]:
        yield from self._explain(run, values | {self._layout.classes: [event.index]}, event)

    def _choose_beside(self, run: Run, values: Values, event: gr.EventData) -> Iterator[Values]:
        chosen = values[self._layout.classes]
        others = [index for index in chosen if index != event.index]
        both = others if event.index in chosen else [*others[: MOST_CLASSES - 1], event.index]
        yield from self._explain(run, values | {self._layout.classes: both}, event)

    def _explain(self, run: Run, values: Values, _: gr.EventData) -> Iterator[Values]:
        on, start = self._layout, perf_counter()
        targets, session = values[on.classes], run.session
        of_before: Values = {on.insertion: None, on.deletion: None}
        yield {on.classes: targets, **of_before}
        methods = list(dict.fromkeys(parse_method(method).name for method in values[on.methods]))
        if not targets or not methods:
            raise ValueError("Choose a class and a method")
        picture = self._picture(run, values)
        prediction = picture.prediction
        made: dict[int, Explanation] = {}
        yield {
            on.bars: views.bars(prediction, targets),
            on.maps: views.maps(prediction, targets, made, methods),
            **of_before,
        }
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
                session.explanations = list(made.values())
                yield {on.maps: views.maps(prediction, targets, made, methods), **of_before}
        notes = dict.fromkeys(note for explanation in session.explanations for note in explanation.notes)
        done = f"{prediction.model}, layer {prediction.feature_map}, in {perf_counter() - start:.1f} s"
        yield {
            on.status: ". ".join([done, *notes]),
            on.stages: views.stages(session.explanations),
            on.agreement: views.agreement(session.explanations),
            on.code: recipe(session, values[on.overlay]),
        }

    def _judge(self, run: Run, values: Values, event: gr.EventData) -> Iterator[Values]:
        # Ends what was running for the maps, so that this finishes it.
        yield from self._explain(run, values, event)
        on, start = self._layout, perf_counter()
        picture, explanations = self._picture(run, values), run.session.explanations
        insertions, deletions = [], []
        yield {on.status: ""}
        for explanation in explanations:
            for name in explanation.maps:
                with run.step():
                    curves = picture.curves(explanation, name, show_progress=True)
                label = name if len(explanations) == 1 else f"{explanation.category}, {name}"
                insertions.append(views.curve(label, curves.insertion))
                deletions.append(views.curve(label, curves.deletion))
                shown = {on.insertion: pd.concat(insertions), on.deletion: pd.concat(deletions)}
                yield shown
        yield {on.status: f"{len(insertions)} maps judged, in {perf_counter() - start:.1f} s", **shown}

    def _picture(self, run: Run, values: Values) -> OpenedPicture:
        name = values[self._layout.model]
        with run.step():
            return run.session.picture(name, self._models[name])

    def _stop(self, values: Values) -> Values:
        values[self._layout.session].stop(values[self._layout.action])
        return {self._layout.status: "Stopped."}

    def _write(self, values: Values) -> Values:
        session = values[self._layout.session]
        return {self._layout.code: recipe(session, values[self._layout.overlay]) if session.explanations else None}

    def _gets(self, made: Callable[[Session, float], tuple[str, bytes]]) -> Callable[[Values], Values]:
        def get(values: Values) -> Values:
            session = values[self._layout.session]
            if not session.explanations:
                return {self._layout.status: "There is nothing to download yet."}
            return {self._layout.download: views.download(*made(session, values[self._layout.overlay]))}

        return get
