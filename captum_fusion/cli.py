"""The command ``captum-fusion``."""

import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from traceback import format_exception
from typing import Annotated, Any

import numpy as np
from cyclopts import App, CycloptsError, Parameter
from rich.table import Table

from captum_fusion._checks import Activation
from captum_fusion._console import Output
from captum_fusion._files import check_writable, write_whole
from captum_fusion._names import one_line, reason
from captum_fusion._picture import check_picture, draw
from captum_fusion._settings import Settings, Whole
from captum_fusion.explain import Explanation
from captum_fusion.explain import explain as explain_picture

_SHOW = warnings.showwarning
FAILED, REFUSED, INTERRUPTED = 1, 2, 130

app = App(
    name="captum-fusion",
    help="Explains image classifiers with class activation maps: Fusion-CAM and the methods it is made of.",
    version=version("captum-fusion"),
    suppress_keyboard_interrupt=False,
)


@app.command
def explain(
    image: Path | None = None,
    *,
    model: str | None = None,
    weights: str | None = None,
    layer: str | None = None,
    grid: Annotated[tuple[Whole, Whole] | None, Parameter(negative="")] = None,
    target: str | None = None,
    methods: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    tolerance: float = 0.0,
    output: Path = Path("fusion_cam.png"),
    save_npz: Path | None = None,
    size: Whole | None = None,
    mean: Annotated[tuple[float, float, float] | None, Parameter(negative="")] = None,
    std: Annotated[tuple[float, float, float] | None, Parameter(negative="")] = None,
    activation: Activation = "softmax",
    device: str | None = None,
) -> None:
    """Explain one picture: which of its parts speak for a class.

    Args:
        image: The picture. Without it, the photograph of a cup of espresso that the demo extra brings.
        model: A torchvision classifier such as resnet50, timm:NAME, hf:NAME or hf:FOLDER for an image classifier of
            Hugging Face, or package.module:callable that returns a model. Without it, the EfficientNet-Lite0 of the
            demo extra with its ImageNet weights.
        weights: A file with a state dict, or "none" for seeded random weights (a dry run that needs no network).
            Without it, the default weights of the model.
        layer: The dotted name of the layer to explain, which may give tokens or a channels-last map. Without it, the
            last feature map that matters as a whole.
        grid: The rows and columns of the layer's tokens, where they do not follow from the input.
        target: The class to explain: an index, a category name or an ImageNet WordNet id. Without it, the predicted
            class.
        methods: Any of grad-cam, grad-cam++, x-grad-cam, group-cam, score-cam, union-cam, fusion-cam, Captum's input
            methods such as integrated-gradients, and "fusion(gradient,region)" for two of them; a panel for each.
            Without it, the stages of Fusion-CAM.
        tolerance: How far Score-CAM, alone or fused, may be from the exact map, in [0, 1); 0.05 takes about a tenth of
            the time where channels are not signed.
        output: The picture to write.
        save_npz: A file for the raw maps and their metadata.
        size: Input size in pixels. Without it, that of the model's weights, else 224.
        mean: Mean of each channel. Without it, that of the model's weights, else ImageNet's.
        std: Standard deviation of each channel. Without it, that of the model's weights, else ImageNet's.
        activation: What makes probabilities of the scores: softmax, or sigmoid for a binary or multi-label classifier.
        device: Where to compute. Without it, cuda if there is one, else cpu.
    """
    check_picture(output)
    if save_npz is not None:
        check_writable(save_npz)
    _check_apart(
        {"--output": output, "--save-npz": save_npz},
        {"the picture": image, "--weights": None if weights in (None, "none") else Path(str(weights))},
    )
    explanation = explain_picture(
        image,
        model=model,
        weights=weights,
        layer=layer,
        grid=grid,
        target=target,
        methods=methods,
        tolerance=tolerance,
        size=size,
        mean=mean,
        std=std,
        activation=activation,
        device=device,
        show_progress=True,
    )
    draw(output, explanation)
    if save_npz is not None:
        write_whole(save_npz, _archive(explanation))
    # Last, so that a reader who has seen enough does not keep the files from being written.
    console = Output(soft_wrap=True, highlight=False, markup=False)
    console.print(_top(explanation))
    console.print(f"Explaining {explanation.target} {explanation.category} by the layer {explanation.feature_map}")
    for note in explanation.notes:
        console.print(note)
    if save_npz is not None:
        console.print(f"Maps: {save_npz}")
    console.print(f"Picture: {output}")


@app.command
def benchmark(settings: Annotated[Settings, Parameter(name="*")]) -> int:
    """Explain many pictures with many methods and judge the explanations.

    Started again with the same output folder, it does what is missing: it goes on where it was, or with more pictures,
    models, methods, percentiles or metrics. Under torchrun, the processes share the pictures.
    """
    # pandas and SciPy take a second that explain need not wait for.
    from captum_fusion.benchmark import NothingExplainedError
    from captum_fusion.benchmark import run as run_benchmark

    try:
        run_benchmark(settings, show_progress=True)
    except NothingExplainedError as error:
        _complain(one_line(error))
        return FAILED
    return 0


@app.command
def report(folder: Path) -> None:
    """Make the tables and pictures of a benchmark again from its records.

    Args:
        folder: The output folder of a benchmark.
    """
    from captum_fusion.benchmark._report import write_report

    write_report(folder).show(Output())


def _check_apart(outputs: dict[str, Path | None], inputs: dict[str, Path | None]) -> None:
    """Refuses to write over what is read, or one file twice."""
    written: dict[Path, str] = {}
    for option, output in outputs.items():
        if output is None:
            continue
        for name, file in inputs.items():
            if file is not None and file.exists() and output.exists() and output.samefile(file):
                raise ValueError(f"{option} {output} would overwrite {name}; expected another file")
        other = written.setdefault(output.resolve(), option)
        if other != option:
            raise ValueError(f"{other} and {option} are both {output}; expected two files")


def _top(explanation: Explanation) -> Table:
    table = Table(title=f"{explanation.model} predicts")
    table.add_column("index", justify="right")
    table.add_column("category")
    table.add_column("probability", justify="right")
    for index, category, probability in explanation.top():
        table.add_row(str(index), category, f"{probability:.1%}")
    return table


def _archive(explanation: Explanation) -> bytes:
    metadata = {
        "image": explanation.image,
        "model": explanation.model,
        "weights": explanation.weights,
        "layer": explanation.layer,
        "target": explanation.target,
        "category": explanation.category,
        "percentile": explanation.percentile,
        "weighting": explanation.weighting,
        "tolerance": explanation.tolerance,
        "probability": explanation.probability,
        "probability_kept": explanation.kept,
        "version": version("captum-fusion"),
    }
    arrays: dict[str, Any] = {name: values[0, 0].numpy() for name, values in explanation.maps.items()}
    content = io.BytesIO()
    np.savez_compressed(content, metadata=json.dumps(metadata), pixels=explanation.pixels[0].numpy(), **arrays)
    return content.getvalue()


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    verbose: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Run a command and say what goes wrong in one line.

    Args:
        tokens: The command and its arguments.
        verbose: Show where an error comes from.
    """
    status: Any = None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            status = app(tokens, result_action="return_value", exit_on_error=False, print_error=False)
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough, and all files are written by then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except Exception as error:
        if verbose:
            sys.stderr.write("".join(format_exception(error)))
        known = isinstance(error, (CycloptsError, OSError, RuntimeError, TypeError, ValueError))
        _complain(one_line(error) if known else reason(error))
        return REFUSED
    return status if isinstance(status, int) else 0


def _complain(line: str) -> None:
    sys.stderr.write(f"captum-fusion: {line}\n")


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    """Shows a warning of this package in a line, and others as they are."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        _complain(one_line(message))
    else:
        _SHOW(message, category, filename, lineno, *rest)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; what goes wrong is one line on standard error."""
    status: int = app.meta(arguments, result_action="return_value", exit_on_error=False, print_error=False)
    return status
