"""The command ``captum-fusion``. Modules that import torch are imported late, so that ``--help`` is instant."""

import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from traceback import format_exception
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, Token, UnknownCommandError

from captum_fusion._app.messages import format_error, install_hint, one_line, report_error
from captum_fusion._app.options import IntOption, ListOption, ModelOptions, ModelSelection
from captum_fusion._app.settings import ExplainSettings, Settings

_show_warning = warnings.showwarning
FAILED, REFUSED, INTERRUPTED = 1, 2, 130

app = App(
    name="captum-fusion",
    help="Explains image classifiers with class activation maps: Fusion-CAM and related methods.",
    version=version("captum-fusion"),
    suppress_keyboard_interrupt=False,
    # Without --no-... for each option, and with every text as it is, though it may look like JSON.
    default_parameter=Parameter(negative="", json_list=False, json_dict=False),
)


def _file(_: object, tokens: Sequence[Token]) -> Path:
    """Reads the path of an image or of a folder."""
    if re.match(r"[a-z]+://", tokens[0].value, re.IGNORECASE):
        raise ValueError(f"{tokens[0].value} is a URL. URLs are not supported; pass a local file")
    if not tokens[0].value:
        raise ValueError("'' is not a file name; expected an image")
    return Path(tokens[0].value)


@app.command
def explain(
    *images: Annotated[Path, Parameter(converter=_file)],
    model: Annotated[str | None, Parameter(alias="-m")] = None,
    options: Annotated[ModelOptions | None, Parameter(name="*")] = None,
    settings: Annotated[ExplainSettings, Parameter(name="*")] = ExplainSettings(),  # noqa: B008
    list_layers: bool = False,
) -> int:
    """Explain images: show which image regions support a class.

    - ``captum-fusion explain cat.jpg -m resnet50 -t "tiger cat" -t tabby``
    - ``captum-fusion explain *.jpg --methods grad-cam score-cam -o explained``

    Args:
        images: Image files or folders of images. Without any, the sample of the demo extra: photographs of a cup of
            espresso and of a cat, one above the other.
        model: A torchvision classifier such as resnet50; timm:NAME; hf:NAME or hf:FOLDER for an image classifier of
            Hugging Face; or package.module:callable for a callable that returns a model. Without it, the
            EfficientNet-Lite0 of the demo extra with its ImageNet weights.
        list_layers: List the layers that --layer accepts, and explain nothing.
    """
    from captum_fusion._app.drawing import check_drawing_format
    from captum_fusion._app.images import find_images
    from captum_fusion._app.job import Job, print_layers
    from captum_fusion._app.output_files import plan_outputs
    from captum_fusion.explain import Explainer

    options = options or {}
    if list_layers:
        print_layers(Explainer(model, **options))
        return 0
    read = {f"--{name}": Path(str(options.get(name))) for name in ("weights", "classes") if options.get(name)}
    files = [file for image in images for file in (find_images(image) if image.is_dir() else [image])]
    save = settings.save_npz, settings.save_predictions
    outputs = plan_outputs(files, settings.output, *save, read, force=settings.force)
    check_drawing_format(outputs[0].drawing)
    settings.check()
    job = Job(settings, outputs)
    job.run(lambda: Explainer(model, **options))
    return (FAILED if job.explained else REFUSED) if job.failed else 0


@app.command(name="methods")
def list_methods() -> None:
    """List the methods, each with a one-line description."""
    from captum_fusion._app.console import Output
    from captum_fusion._app.methods import METHODS, summary

    lines = [(name, summary(name)) for name in METHODS]
    lines.append(("fusion(gradient,region)", "Fuses two of these methods in the way of Fusion-CAM."))
    width = max(len(name) for name, _ in lines)
    console = Output(soft_wrap=True)
    for name, line in lines:
        console.print(f"{name:{width}}  {line}")


@app.command
def page(
    selection: Annotated[ModelSelection, Parameter(name="*")] = ModelSelection(),  # noqa: B008
    *,
    host: str = "127.0.0.1",
    port: IntOption | None = None,
    names: Annotated[tuple[str, ...], ListOption, Parameter(name="--name")] = (),
) -> int:
    """Explain photographs on a page in a browser, until Ctrl+C.

    Args:
        host: The address to listen on. Without it, only this machine can open the page. With 0.0.0.0, everybody who
            reaches this machine can open it and use its models and its CPU.
        port: The port to listen on. Without it, the first free port from 7860.
        names: Further host names of this machine under which browsers may request the page; others are refused.
    """
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"port is {port}; expected a number from 1 to 65535")
    arguments = selection.each()
    missing = [name for name in ("gradio", "skimage") if find_spec(name) is None]
    if missing:
        raise ValueError(f"The page needs the package {missing[0]}: {install_hint('page')}")
    from captum_fusion._app.console import Output
    from captum_fusion.page import load_models, serving

    with serving(load_models(arguments), host, port, names) as address:
        Output(soft_wrap=True).print(f"The page is at {address} until Ctrl+C.")
        # Browsers' uploads are also deleted if the process is terminated or loses its terminal.
        for name in ("SIGTERM", "SIGHUP"):
            # Windows has no SIGHUP.
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


@app.command
def benchmark(settings: Annotated[Settings, Parameter(name="*")]) -> int:
    """Explain many images with many methods and evaluate the explanations.

    A second run with the same output folder resumes the first one: it computes only missing records, also after you add
    images, models, methods, percentiles or metrics. Under torchrun, the processes share the images.
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
    """Rewrite the tables and charts of a benchmark from its records.

    Args:
        folder: The output folder of a benchmark.
    """
    from captum_fusion._app.console import Output
    from captum_fusion.benchmark._report import write_report

    write_report(folder).show(Output())


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    verbose: bool = False,
) -> int:
    """Run a command, and report an error in one line.

    Args:
        tokens: The command and its arguments.
        verbose: Also show the traceback of an error.
    """
    if str(Path.cwd()) not in sys.path:
        # For package.module:callable, as python -m has it.
        sys.path.insert(0, str(Path.cwd()))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_warn, set())
            # The classifier warns of this itself, without naming an argument that the command does not have.
            warnings.filterwarnings("ignore", "forward_func returned rows that are not negative and sum to 1")
            warnings.filterwarnings("ignore", "Input Tensor .* did not already require gradients")
            status = app(tokens, result_action="return_value", exit_on_error=False, print_error=False)
    except KeyboardInterrupt:
        report_error("interrupted")
        return INTERRUPTED
    except Exception as error:
        if verbose:
            sys.stderr.write("".join(format_exception(error)))
        report_error(_line_for(error, tokens))
        return REFUSED
    return status if isinstance(status, int) else 0


def _line_for(error: Exception, tokens: Sequence[str]) -> str:
    """The line for an error that these arguments lead to."""
    if isinstance(error, UnknownCommandError) and Path(tokens[0]).suffix:
        return f"unknown command {tokens[0]!r}; did you mean: {shlex.join(['captum-fusion', 'explain', *tokens])}"
    return one_line(error) if isinstance(error, CycloptsError) else format_error(error)


def _warn(
    shown: set[str], message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any
) -> None:
    """Shows a warning of this package in a line, once, and others as they are."""
    # The library's warnings name the outermost caller, which is the script itself.
    script = getattr(sys.modules["__main__"], "__file__", None)
    if filename == script or Path(filename).is_relative_to(Path(__file__).parent):
        if (line := one_line(message)) not in shown:
            shown.add(line)
            report_error(line)
    else:
        _show_warning(message, category, filename, lineno, *rest)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; an error is one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A name that the terminal's encoding lacks is shown with escapes rather than end the work.
            stream.reconfigure(errors="backslashreplace")
    status: int | None = app.meta(arguments, result_action="return_value", exit_on_error=False, print_error=False)
    # --help has none.
    return status or 0
