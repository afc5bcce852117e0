"""The command ``captum-fusion``. Nothing is imported at its top that imports torch: ``--help`` need not wait for it."""

import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from traceback import format_exception
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, Token, UnknownCommandError

from captum_fusion._app.messages import format_error, report_error
from captum_fusion._app.names import one_line
from captum_fusion._app.options import DEFAULT_ALPHA, DEFAULT_MODEL
from captum_fusion._app.settings import IntOption, ListOption, Settings, per_model
from captum_fusion.arguments import Activation, Weighting

_SHOW = warnings.showwarning
FAILED, REFUSED, INTERRUPTED = 1, 2, 130

app = App(
    name="captum-fusion",
    help="Explains image classifiers with class activation maps: Fusion-CAM and the methods it is made of.",
    version=version("captum-fusion"),
    suppress_keyboard_interrupt=False,
)


def _file(_: object, tokens: Sequence[Token]) -> Path:
    """A picture's file."""
    if re.match(r"[a-z]+://", tokens[0].value, re.IGNORECASE):
        raise ValueError(f"{tokens[0].value} is a URL, and nothing is fetched; expected a file that is here")
    file = Path(tokens[0].value)
    if not file.name:
        raise ValueError(f"{tokens[0].value!r} names no file; expected a picture")
    return file


@app.command
def explain(
    *images: Annotated[Path, Parameter(converter=_file)],
    model: Annotated[str | None, Parameter(alias="-m")] = None,
    weights: str | None = None,
    layer: Annotated[str | None, Parameter(alias="-l")] = None,
    grid: Annotated[tuple[IntOption, IntOption] | None, Parameter(negative="")] = None,
    target: Annotated[tuple[str, ...], Parameter(alias="-t", negative="", show_default=False)] = (),
    methods: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)] = (),
    percentile: float = 10.0,
    weighting: Weighting = "normalized",
    tolerance: float = 0.0,
    alpha: float = DEFAULT_ALPHA,
    output: Annotated[Path, Parameter(alias="-o")] = Path("explained"),
    save_npz: Path | None = None,
    force: Annotated[bool, Parameter(negative="")] = False,
    size: IntOption | None = None,
    mean: Annotated[tuple[float, float, float] | None, Parameter(negative="")] = None,
    std: Annotated[tuple[float, float, float] | None, Parameter(negative="")] = None,
    activation: Activation = "softmax",
    device: str | None = None,
) -> int:
    """Explain pictures: which of their parts speak for a class.

    - ``captum-fusion explain cat.jpg -m resnet50 -t "tiger cat" -t tabby``
    - ``captum-fusion explain *.jpg --methods grad-cam score-cam -o explained``

    Args:
        images: The pictures. Without any, what the demo extra brings: photographs of a cup of espresso and of a cat,
            one above the other.
        model: A torchvision classifier such as resnet50, timm:NAME, hf:NAME or hf:FOLDER for an image classifier of
            Hugging Face, or package.module:callable that returns a model. Without it, the EfficientNet-Lite0 of the
            demo extra with its ImageNet weights.
        weights: A file with a state dict, or "none" for seeded random weights (a dry run that needs no network).
            Without it, the default weights of the model.
        layer: The dotted name of the layer to explain, which may give tokens or a channels-last map. Without it, the
            last feature map that matters as a whole.
        grid: The rows and columns of the layer's tokens, where they do not follow from the input.
        target: The class to explain: an index, a category name or an ImageNet WordNet id; given several times, each in
            a row of its own. Without it, the predicted class.
        methods: Methods that "captum-fusion methods" lists, and "fusion(gradient,region)" for two of them; a panel for
            each. Without it, the stages of Fusion-CAM.
        percentile: The percentile of the denoising step of Fusion-CAM and Union-CAM, in [0, 100).
        weighting: How fusions that name none weigh their maps.
        tolerance: How far Score-CAM, alone or fused, may be from the exact map, in [0, 1); 0.05 takes about a tenth of
            the time where channels are not signed.
        alpha: How much of the photograph a map covers where it is strongest, in [0, 1].
        output: The picture to write, or a folder for pictures named after the explained ones.
        save_npz: A file for the raw maps and their metadata, or a folder, likewise.
        force: Overwrite files.
        size: Input size in pixels. Without it, that of the model's weights, else 224.
        mean: Mean of each channel. Without it, that of the model's weights, else ImageNet's.
        std: Standard deviation of each channel. Without it, that of the model's weights, else ImageNet's.
        activation: What makes probabilities of the scores: softmax, or sigmoid for a binary or multi-label classifier.
        device: Where to compute. Without it, cuda if there is one, else cpu.
    """
    from captum_fusion._app.drawing import check_picture
    from captum_fusion._app.job import Job
    from captum_fusion._app.output_files import plan_outputs
    from captum_fusion.explain import Explainer

    read = {} if weights in (None, "none") else {"--weights": Path(str(weights))}
    places = plan_outputs(images, output, save_npz, read, force=force)
    check_picture(places[0].picture)
    job = Job(
        places=places,
        targets=target,
        methods=methods,
        percentile=percentile,
        weighting=weighting,
        tolerance=tolerance,
        alpha=alpha,
    )
    job.check()
    job.run(
        lambda: Explainer(
            model,
            weights=weights,
            layer=layer,
            grid=grid,
            size=size,
            mean=mean,
            std=std,
            activation=activation,
            device=device,
        )
    )
    return (FAILED if job.done else REFUSED) if job.lost else 0


@app.command(name="methods")
def list_methods() -> None:
    """List the methods, each with what it computes."""
    from captum_fusion._app.console import Output
    from captum_fusion._app.methods import METHODS, summary

    lines = [(name, summary(name)) for name in METHODS]
    lines.append(("fusion(gradient,region)", "Fuses two of the others as Fusion-CAM does."))
    width = max(len(name) for name, _ in lines)
    console = Output(soft_wrap=True, highlight=False, markup=False)
    for name, line in lines:
        console.print(f"{name:{width}}  {line}")


@app.command
def page(
    *,
    models: Annotated[tuple[str, ...], ListOption, Parameter(name="--model")] = (DEFAULT_MODEL,),
    weights: Annotated[tuple[str, ...], ListOption] = (),
    layers: Annotated[tuple[str, ...], ListOption, Parameter(name="--layer")] = (),
    grid: Annotated[tuple[IntOption, IntOption] | None, Parameter(negative="")] = None,
    size: IntOption | None = None,
    mean: Annotated[tuple[float, float, float] | None, Parameter(negative="")] = None,
    std: Annotated[tuple[float, float, float] | None, Parameter(negative="")] = None,
    activation: Activation = "softmax",
    device: str | None = None,
    host: str = "127.0.0.1",
    port: IntOption | None = None,
) -> int:
    """Explain photographs on a page in a browser, until Ctrl+C.

    Args:
        models: One or more classifiers to choose from, named as for explain.
        weights: For each model a file with a state dict or "none" for seeded random weights, or one for all. Without
            it, the default weights.
        layers: The dotted name of a layer for each model, or one for all. Without it, the last feature map that matters
            as a whole.
        grid: The rows and columns of these layers' tokens, where they do not follow from the input.
        size: Input size in pixels. Without it, that of each model's weights, else 224.
        mean: Mean of each channel. Without it, that of each model's weights, else ImageNet's.
        std: Standard deviation of each channel. Without it, that of each model's weights, else ImageNet's.
        activation: What makes probabilities of the scores: softmax, or sigmoid for binary or multi-label classifiers.
        device: Where to compute. Without it, cuda if there is one, else cpu.
        host: The address to listen on. Without it, only this machine sees the page; 0.0.0.0 shows it, and what it
            computes with, to everybody who reaches this machine.
        port: The port to listen on. Without it, the first free one from 7860.
    """
    each_weights, each_layer = (
        per_model(name, given, len(models)) for name, given in (("weights", weights), ("layers", layers))
    )
    shared = {"grid": grid, "size": size, "mean": mean, "std": std, "activation": activation, "device": device}
    try:
        from captum_fusion._app.console import Output
        from captum_fusion.page import load_models, serving
    except ModuleNotFoundError as error:
        raise ValueError(f"The page needs the package {error.name}: pip install 'captum-fusion[page]'") from error
    loaded = load_models(
        [
            {"model": model, "weights": weight, "layer": layer, **shared}
            for model, weight, layer in zip(models, each_weights, each_layer, strict=True)
        ]
    )
    with serving(loaded, host, port) as address:
        Output(soft_wrap=True, highlight=False, markup=False).print(f"The page is at {address} until Ctrl+C.")
        # Whoever ends it otherwise does not keep what browsers uploaded either.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


@app.command
def benchmark(settings: Annotated[Settings, Parameter(name="*")]) -> int:
    """Explain many pictures with many methods and judge the explanations.

    Started again with the same output folder, it does what is missing: it goes on where it was, or with more pictures,
    models, methods, percentiles or metrics. Under torchrun, the processes share the pictures.
    """
    from captum_fusion.benchmark import NothingExplainedError
    from captum_fusion.benchmark import run as run_benchmark

    try:
        run_benchmark(settings, show_progress=True)
    except NothingExplainedError as error:
        report_error(one_line(error))
        return FAILED
    return 0


@app.command
def report(folder: Path) -> None:
    """Make the tables and pictures of a benchmark again from its records.

    Args:
        folder: The output folder of a benchmark.
    """
    from captum_fusion._app.console import Output
    from captum_fusion.benchmark._report import write_report

    write_report(folder).show(Output())


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
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            status = app(tokens, result_action="return_value", exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        report_error("interrupted")
        return INTERRUPTED
    except Exception as error:
        if verbose:
            sys.stderr.write("".join(format_exception(error)))
        report_error(_said(error, tokens))
        return REFUSED
    return status if isinstance(status, int) else 0


def _said(error: Exception, tokens: Sequence[str]) -> str:
    """What to say of an error that these arguments lead to."""
    if isinstance(error, UnknownCommandError) and Path(tokens[0]).suffix:
        return f"there is no command {tokens[0]!r}; did you mean: {shlex.join(['captum-fusion', 'explain', *tokens])}"
    return one_line(error) if isinstance(error, CycloptsError) else format_error(error)


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    """Shows a warning of this package in a line, and others as they are."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        report_error(one_line(message))
    else:
        _SHOW(message, category, filename, lineno, *rest)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; what goes wrong is one line on standard error."""
    status: int = app.meta(arguments, result_action="return_value", exit_on_error=False, print_error=False)
    return status
