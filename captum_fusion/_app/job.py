"""The work of the command ``explain``: one model, many images, each drawn, saved and reported."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from captum_fusion._app.console import Output, ProgressDisplay
from captum_fusion._app.drawing import draw
from captum_fusion._app.explainer import Explainer
from captum_fusion._app.explanation import Explanation
from captum_fusion._app.images import ImageError, check_image
from captum_fusion._app.messages import format_error, report_error
from captum_fusion._app.output_files import OutputFiles, archive, prediction_rows, prediction_table, write_atomically
from captum_fusion._app.settings import ExplainSettings


@dataclass
class Job:
    """Images to explain by one model, and the outcome.

    If one of several images cannot be explained, it is reported, and the others are explained.
    """

    settings: ExplainSettings
    outputs: Sequence[OutputFiles]
    explained: int = field(default=0, init=False)
    """The number of images that were explained."""
    failed: list[OutputFiles] = field(default_factory=list, init=False)
    """The images that could not be."""

    def run(self, load: Callable[[], Explainer]) -> None:
        """Explains the images.

        Args:
            load (Callable): Loads the model, once there is an image that can be read.

        Raises:
            Exception: The error of the only image, or one that is the fault of no image in particular.
        """
        console, progress, settings = Output(soft_wrap=True), ProgressDisplay(), self.settings
        readable = [output for output in self.outputs if self._is_readable(output)]
        explainer = None
        rows: list[dict[str, Any]] = []
        try:
            for number, output in enumerate(readable, start=1):
                explainer = explainer or load()
                prefix = "" if self._is_single else f"{number}/{len(readable)} {output.image}: "
                try:
                    with progress.bar(prefix) as begin:
                        explanations = self._explain(explainer, output.image, begin)
                    content = draw(explanations, output.drawing.suffix, settings.alpha, settings.boxes)
                    write_atomically(output.drawing, content)
                    if output.maps is not None:
                        write_atomically(output.maps, archive(explanations[0]))
                except Exception as error:
                    self._fail(output, error)
                    continue
                self.explained += 1
                rows += prediction_rows(explanations[0], settings.top)
                self._print_result(console, output, explanations)
        finally:
            if settings.save_predictions is not None and rows:
                write_atomically(settings.save_predictions, prediction_table(rows, settings.save_predictions.suffix))
        if not self._is_single:
            without = f"; failed: {', '.join(str(output.image) for output in self.failed)}" if self.failed else ""
            console.print(f"{self.explained} of {len(self.outputs)} images explained{without}")

    @property
    def _is_single(self) -> bool:
        return len(self.outputs) == 1

    def _is_readable(self, output: OutputFiles) -> bool:
        """Tells whether an image's file exists and begins as an image does."""
        try:
            if output.image is not None:
                check_image(output.image)
        except (OSError, ImageError) as error:
            self._fail(output, error)
            return False
        return True

    def _fail(self, output: OutputFiles, error: Exception) -> None:
        """Reports an image that cannot be explained, or raises the error where it is not this image's fault."""
        named = isinstance(error, (OSError, ImageError))
        # An error before any image was explained is the fault of none of them, unless it names one.
        if self._is_single or not (named or self.explained):
            raise error
        report_error(format_error(error) if named else f"{output.image}: {format_error(error)}")
        self.failed.append(output)

    def _explain(self, explainer: Explainer, path: Path | None, begin: Callable[[str], None]) -> list[Explanation]:
        """An explanation for each target."""
        begin("the prediction")
        image = explainer.open(path)
        classes = len(image.prediction.probabilities)
        settings = self.settings
        explain = partial(
            image.explain,
            percentile=settings.percentile,
            weighting=settings.weighting,
            tolerance=settings.tolerance,
            show_progress=True,
        )
        targets: list[int | None] = [
            *dict.fromkeys(explainer.classifier.target(text, classes) for text in settings.target)
        ]
        explanations = []
        for target in targets or [None]:
            # One by one, so that the progress names each; the maps are cached.
            for method in settings.methods:
                begin(method)
                explain(target, [method])
            if not settings.methods:
                begin("fusion-cam")
            explanations.append(explain(target, settings.methods))
        return explanations

    def _print_result(self, console: Output, output: OutputFiles, explanations: Sequence[Explanation]) -> None:
        """Prints what was explained, in one line if there are several images."""
        first = explanations[0]
        if self._is_single:
            table = Table("index", "category", "probability", title=f"{first.model} predicts")
            for index, category, probability in first.top(self.settings.top):
                table.add_row(str(index), category, f"{probability:.1%}")
            console.print(table)
            for each in explanations:
                console.print(f"Explaining {each.target} {each.category} by the layer {first.feature_map}")
        else:
            classes = ", ".join(f"{each.category} {each.probability:.1%}" for each in explanations)
            console.print(f"{first.image}: {classes}; explained in {output.drawing}")
        for note in dict.fromkeys(note for each in explanations for note in each.notes):
            console.print(note)
        if self._is_single:
            predictions = self.settings.save_predictions
            for label, file in (("Maps", output.maps), ("Predictions", predictions), ("Image", output.drawing)):
                if file is not None:
                    console.print(f"{label}: {file}")


def print_layers(explainer: Explainer) -> None:
    """Prints the layers that can be explained, in the order in which they run, and which of them is the default."""
    default = explainer.default_layer()
    table = Table("layer", "channels", "size", "output", "")
    for layer in explainer.layers():
        size, note = "x".join(map(str, layer.shape[1:])), "the default" if layer.name == default else ""
        table.add_row(layer.name, str(layer.shape[0]), size, layer.form, note)
    if not table.row_count:
        raise ValueError(f"No layer of {explainer.classifier.name} returns a feature map")
    Output().print(table)
