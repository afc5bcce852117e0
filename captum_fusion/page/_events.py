"""Events of the page, and the updates that follow from them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import perf_counter, time
from typing import Any

import gradio as gr
import pandas as pd

from captum_fusion import Progress, Stopped
from captum_fusion._app.images import open_photograph
from captum_fusion._app.messages import one_line, reason
from captum_fusion._app.methods import parse_method
from captum_fusion.explain import Explanation
from captum_fusion.page import _downloads as downloads
from captum_fusion.page import _panels as panels
from captum_fusion.page._browser import NO_PANEL, Model, Run, Tab, Tabs, View
from captum_fusion.page._layout import CURVES, MOST_CLASSES, Layout
from captum_fusion.page._samples import samples

_KNOWN = (OSError, RuntimeError, TypeError, ValueError)
_PROGRESS = gr.Progress()
_OVERLAY_MOVED = """strength => {
  window.captumFusionOverlay = strength;
  document.dispatchEvent(new Event("captum-fusion-overlay"));
}"""
# Actions reach the server in any order, so the browser numbers them; number and name of a tab outlive a reload.
_NUMBERED = """(_, ...values) => {
  const number = Number(sessionStorage.captumFusionActions ?? 0) + 1;
  sessionStorage.captumFusionActions = number;
  sessionStorage.captumFusionTab ??= Array.from(crypto.getRandomValues(new Uint32Array(4))).join("-");
  return [`${number} ${sessionStorage.captumFusionTab}`, ...values];
}"""
# Uploaded files older than the second number are deleted at intervals of the first; each is read at once.
_DELETE_SECONDS = (30, 60)

Values = dict[Any, Any]
Take = Callable[[Tab, Values, gr.EventData], None]
Work = Callable[[Run], Iterator[Values]]


class Page:
    """The page for some models, as Gradio's ``blocks``."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._samples = samples()
        self._tabs = Tabs()
        # A photograph takes up to 150 MB while it is read.
        self._reading = Lock()
        with gr.Blocks(
            title="captum-fusion", analytics_enabled=False, delete_cache=_DELETE_SECONDS, fill_width=True
        ) as self.blocks:
            self._layout = Layout(list(models), self._samples)
            self._connect()

    def _connect(self) -> None:
        on = self._layout
        self._settings = [on.model, on.methods, on.overlay, on.percentile, on.tolerance, on.weighting]
        inputs = {on.action, *self._settings}
        # Runs of one tab end each other, and tabs take turns with a model.
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
        self.blocks.load(
            self._runs(self._show, self._open), **explains | {"outputs": [*explains["outputs"], *self._settings]}
        )
        self.blocks.unload(self._close)
        on.sample.choose(self._runs(self._explain, self._take_sample), **explains)
        on.upload.upload(self._runs(self._explain, self._take_upload), **explains | {"inputs": inputs | {on.upload}})
        # Room for the next one.
        on.upload.upload(lambda: None, outputs=[on.upload], api_visibility="private", **at_once)
        on.bars.choose(self._runs(self._explain, self._choose), **explains)
        on.bars.beside(self._runs(self._explain, self._choose_beside), **explains)
        on.classes.input(self._runs(self._explain, self._choose_typed), **explains | {"inputs": inputs | {on.classes}})
        for setting in (on.model, on.percentile, on.tolerance, on.weighting):
            setting.input(self._runs(self._explain), **explains)
        # Gradio reports typed text as a change, not as an input.
        on.methods.change(self._runs(self._explain), **explains)
        on.tabs.select(self._runs(self._explain, self._turn), **explains)
        on.stop.click(self._stop, **handled | at_once, outputs=[on.status, on.stages, on.agreement, on.code])
        on.overlay.input(None, [on.overlay], js=_OVERLAY_MOVED)
        on.overlay.change(self._write, **handled | at_once, outputs=[on.code])
        for button, make in (
            (on.get_picture, downloads.picture),
            (on.get_maps, downloads.maps),
            (on.get_python, downloads.python),
        ):
            button.click(self._gets(make), **runs, outputs=[on.status, on.download])

    def _runs(self, work: Work, take: Take | None = None) -> Callable[..., Iterator[Values]]:
        """Makes the handler of an action: it stores the action, then works, can be stopped, and reports errors.

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

            update: Values = {}
            try:
                tab, action = self._tab(values, request)
                # A method that is mistyped leaves everything as it is.
                values[on.methods] = list(dict.fromkeys(parse_method(name).name for name in values[on.methods]))
                if take != self._open or tab.is_empty:
                    tab.set(action, values)
                with suppress(Stopped):
                    if take is not None:
                        take(tab, values, event)
                    # What a run shows is shown before the next one begins to.
                    with tab.run(action, listener) as started:
                        yield {on.status: ""}
                        try:
                            for update in work(started):
                                yield update
                        except Exception as error:
                            # Nothing stays that may be of other settings.
                            update = self._nothing(self._results) | {on.status: _sentence(error)}
                            yield update
            except Exception as error:
                yield {on.status: _sentence(error)}
            curves = {curve: update[curve] for curve in (on.insertion, on.deletion) if curve in update}
            yield {on.status: gr.skip(), **curves}

        return run

    def _tab(self, values: Values, request: gr.Request) -> tuple[Tab, float]:
        """The tab of an action, and the action's number."""
        number, _, name = values[self._layout.action].partition(" ")
        return self._tabs.connect(name, str(request.session_hash)), float(number)

    def _nothing(self, of: Sequence[Any]) -> Values:
        on = self._layout
        empty = {on.maps: panels.NOTHING, on.stages: panels.NOTHING, on.agreement: panels.NOTHING, on.code: ""}
        return {component: empty.get(component) for component in of}

    def _close(self, request: gr.Request) -> None:
        self._tabs.disconnect(str(request.session_hash))

    def _open(self, tab: Tab, *_: object) -> None:
        # A tab that was reloaded keeps its photograph.
        if tab.is_empty:
            tab.look_at(self._samples[0].photograph, self._samples[0].python)

    def _take_sample(self, tab: Tab, _: Values, event: gr.EventData) -> None:
        sample = self._samples[event.index]
        tab.look_at(sample.photograph, sample.python)

    def _take_upload(self, tab: Tab, values: Values, _: gr.EventData) -> None:
        file = Path(values[self._layout.upload])
        with self._reading:
            tab.look_at(open_photograph(file, untrusted=True), [repr(file.name)])

    def _turn(self, tab: Tab, values: Values, event: gr.EventData) -> None:
        """Begins a run for the curves alone, unless they are shown, or a run is on its way that will show them."""
        tab.open_panel = max(tab.open_panel, (float(values[self._layout.action].partition(" ")[0]), event.value))
        if tab.open_panel[1] != CURVES or tab.view is None or tab.view is tab.judged:
            raise Stopped

    def _choose(self, tab: Tab, values: Values, event: gr.EventData) -> None:
        tab.choose(values[self._layout.model], [event.index])

    def _choose_beside(self, tab: Tab, values: Values, event: gr.EventData) -> None:
        model = values[self._layout.model]
        chosen = tab.targets(model) or []
        others = [index for index in chosen if index != event.index]
        tab.choose(model, others if event.index in chosen else [*others[: MOST_CLASSES - 1], event.index])

    def _choose_typed(self, tab: Tab, values: Values, _: gr.EventData) -> None:
        tab.choose(values[self._layout.model], values[self._layout.classes])

    def _show(self, run: Run) -> Iterator[Values]:
        # After a reload the controls show their defaults, the first panel is open, and the list of classes is empty.
        run.tab.listed, run.tab.open_panel = None, NO_PANEL
        yield {setting: run.tab.settings[setting] for setting in self._settings}
        yield from self._explain(run)

    def _explain(self, run: Run) -> Iterator[Values]:
        on, tab, start, begun = self._layout, run.tab, perf_counter(), time()
        values = tab.settings
        name, methods = values[on.model], values[on.methods]
        model = self._models[name]
        with run.step(model):
            image, python = tab.image(name, self._models)
        prediction = image.prediction
        targets = tab.targets(name)
        # A class of another model may not exist here.
        if targets is None or any(target >= len(prediction.probabilities) for target in targets):
            targets = [prediction.top(1)[0][0]]
            tab.choose(name, targets)
        if tab.listed is not image:
            tab.listed = image
            yield {on.classes: gr.Dropdown(panels.labelled(prediction), value=targets)}
        no_curves: Values = {on.insertion: None, on.deletion: None}
        yield {on.classes: targets, on.bars: panels.bars(prediction, targets), **no_curves}
        if not targets or not methods:
            raise ValueError("Choose a class and a method")
        explanations: dict[int, Explanation] = {}
        yield {on.maps: panels.maps(begun, prediction, targets, explanations, methods), **no_curves}
        for upto in range(1, len(methods) + 1):
            for target in targets:
                with run.step(model):
                    explanations[target] = image.explain(
                        target,
                        methods[:upto],
                        percentile=values[on.percentile],
                        weighting=values[on.weighting],
                        tolerance=values[on.tolerance],
                        show_progress=True,
                    )
                yield {on.maps: panels.maps(begun, prediction, targets, explanations, methods), **no_curves}
        run.check()
        view = tab.view = View(image, list(explanations.values()), model, python)
        notes = dict.fromkeys(note for explanation in view.explanations for note in explanation.notes)
        summary = f"{prediction.model}, layer {prediction.feature_map}, in {perf_counter() - start:.1f} s"
        yield {
            on.status: ". ".join([summary, *notes]),
            on.stages: panels.stages(view.explanations),
            on.agreement: panels.agreement(view.explanations),
            # No run sets the overlay, which the user may have moved since.
            on.code: downloads.recipe(view, tab.settings[on.overlay]),
        }
        if tab.open_panel[1] == CURVES:
            yield from self._judge(run, view)

    def _judge(self, run: Run, view: View) -> Iterator[Values]:
        on, start = self._layout, perf_counter()
        insertions, deletions = [], []
        yield {on.status: ""}
        for explanation in view.explanations:
            for name in explanation.maps:
                with run.step(view.model):
                    curves = view.image.curves(explanation, name, show_progress=True)
                label = name if len(view.explanations) == 1 else f"{explanation.category}, {name}"
                insertions.append(panels.curve(label, curves.insertion))
                deletions.append(panels.curve(label, curves.deletion))
        run.tab.judged = view
        # All at once: a plot that is drawn takes no notice of further curves.
        yield {
            on.status: f"{len(insertions)} maps judged, in {perf_counter() - start:.1f} s",
            on.insertion: pd.concat(insertions),
            on.deletion: pd.concat(deletions),
        }

    def _stop(self, values: Values, request: gr.Request) -> Values:
        on = self._layout
        tab, action = self._tab(values, request)
        tab.stop(action)
        # Stages and code of the maps before belong to none that are shown now.
        outdated = [on.stages, on.agreement, on.code] if tab.view is None else []
        return {on.status: "Stopped.", **self._nothing(outdated)}

    def _write(self, values: Values, request: gr.Request) -> Values:
        on = self._layout
        tab, action = self._tab(values, request)
        tab.set(action, values)
        return {on.code: downloads.recipe(tab.view, values[on.overlay]) if tab.view else gr.skip()}

    def _gets(self, make: Callable[[View, float], tuple[str, bytes]]) -> Callable[[Values, gr.Request], Values]:
        def get(values: Values, request: gr.Request) -> Values:
            on = self._layout
            view = self._tab(values, request)[0].view
            if view is None:
                return {on.status: "There is nothing to download yet."}
            return {on.download: panels.download(*make(view, values[on.overlay]))}

        return get


def _sentence(error: Exception) -> str:
    return one_line(error) if isinstance(error, _KNOWN) else reason(error)
