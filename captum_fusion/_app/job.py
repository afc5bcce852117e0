"""Explains files: one model, many pictures, what it sees in them written and said."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.table import Table

from captum_fusion._app.archive import archive
from captum_fusion._app.console import Output, progress_bar
from captum_fusion._app.drawing import drawn
from captum_fusion._app.images import PictureError, check_photograph
from captum_fusion._app.messages import format_error, report_error
from captum_fusion._app.methods import parse_method
from captum_fusion._app.output_files import OutputFiles, write_at
from captum_fusion._engine.guards import check_percentile, check_tolerance
from captum_fusion.arguments import Weighting
from captum_fusion.explain import Explainer, Explanation


@dataclass(kw_only=True)
class Job:
    """What is done with each picture, and what has become of them.

    One of several pictures that cannot be explained is told, and costs none of the others.
    """

    places: Sequence[OutputFiles]
    targets: Sequence[str]
    methods: Sequence[str]
    percentile: float
    weighting: Weighting
    tolerance: float
    alpha: float
    done: int = field(default=0, init=False)
    """How many pictures were explained."""
    lost: list[OutputFiles] = field(default_factory=list, init=False)
    """Those that could not be."""

    def check(self) -> None:
        """Refuses what names nothing or is outside its range."""
        check_percentile(self.percentile)
        check_tolerance(self.tolerance)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; expected a number in [0, 1]")
        for method in self.methods:
            parse_method(method, self.weighting)
        if len(self.targets) > 1 and any(place.maps for place in self.places):
            raise ValueError(f"{len(self.targets)} targets are given; expected one where the maps are saved")

    def run(self, load: Callable[[], Explainer]) -> None:
        """Explains the pictures.

        Args:
            load (Callable): Loads the model, once there is a picture that can be read.

        Raises:
            Exception: What is wrong with the only picture, or with none in particular.
        """
        console = Output(soft_wrap=True, highlight=False, markup=False)
        readable = [place for place in self.places if self._begins(place)]
        explainer = None
        for number, place in enumerate(readable, start=1):
            explainer = explainer or load()
            try:
                with progress_bar("" if self._alone else f"{number}/{len(readable)} {place.image}: ") as begin:
                    explanations = self._explained(explainer, place.image, begin)
                write_at(place.picture, drawn(explanations, place.picture.suffix, self.alpha))
                if place.maps is not None:
                    write_at(place.maps, archive(explanations[0]))
            except Exception as error:
                self._lose(place, error)
                continue
            self.done += 1
            _say(console, place, explanations, self._alone)
        if not self._alone:
            without = f"; not {', '.join(str(place.image) for place in self.lost)}" if self.lost else ""
            console.print(f"{self.done} of {len(self.places)} pictures explained{without}")

    @property
    def _alone(self) -> bool:
        return len(self.places) == 1

    def _begins(self, place: OutputFiles) -> bool:
        """Whether a picture's file is there and begins as a picture does."""
        try:
            if place.image is not None:
                check_photograph(place.image)
        except (OSError, PictureError) as error:
            self._lose(place, error)
            return False
        return True

    def _lose(self, place: OutputFiles, error: Exception) -> None:
        """Tells that a picture cannot be explained, or raises the error where that is not this picture's fault."""
        named = isinstance(error, (OSError, PictureError))
        # What no picture has survived yet is the fault of none of them, unless it says so.
        if self._alone or not (named or self.done):
            raise error
        report_error(format_error(error) if named else f"{place.image}: {format_error(error)}")
        self.lost.append(place)

    def _explained(self, explainer: Explainer, image: Path | None, begin: Callable[[str], None]) -> list[Explanation]:
        """An explanation for each target."""
        begin("the prediction")
        picture = explainer.open(image)
        classes = len(picture.prediction.probabilities)
        explain = partial(
            picture.explain,
            percentile=self.percentile,
            weighting=self.weighting,
            tolerance=self.tolerance,
            show_progress=True,
        )
        targets: list[int | None] = [
            *dict.fromkeys(explainer.classifier.target(text, classes) for text in self.targets)
        ]
        explanations = []
        for target in targets or [None]:
            # One by one, so that each is announced; what is there already is remembered.
            for method in self.methods:
                begin(method)
                explain(target, [method])
            if not self.methods:
                begin("fusion-cam")
            explanations.append(explain(target, self.methods))
        return explanations


def _say(console: Output, place: OutputFiles, explanations: Sequence[Explanation], alone: bool) -> None:
    """Says what was explained, in a line where there are other pictures; after the files are written."""
    first = explanations[0]
    if alone:
        console.print(_top(first))
        for explanation in explanations:
            console.print(f"Explaining {explanation.target} {explanation.category} by the layer {first.feature_map}")
    else:
        classes = ", ".join(f"{each.category} {each.probability:.1%}" for each in explanations)
        console.print(f"{first.image}: {classes}; explained in {place.picture}")
    for note in dict.fromkeys(note for explanation in explanations for note in explanation.notes):
        console.print(note)
    if alone:
        if place.maps is not None:
            console.print(f"Maps: {place.maps}")
        console.print(f"Picture: {place.picture}")


def _top(explanation: Explanation) -> Table:
    table = Table(title=f"{explanation.model} predicts")
    table.add_column("index", justify="right")
    table.add_column("category")
    table.add_column("probability", justify="right")
    for index, category, probability in explanation.top():
        table.add_row(str(index), category, f"{probability:.1%}")
    return table
