"""A page on which one explains photographs in a browser."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from captum_fusion.explain import Explainer
from captum_fusion.page._browser import Model
from captum_fusion.page._events import Page
from captum_fusion.page._layout import asset, theme

_LARGEST_FILE = "50mb"


def load_models(arguments: Sequence[dict[str, Any]]) -> dict[str, Model]:
    """The models to choose from, by names that tell them apart; the arguments are those of ``Explainer``."""
    names = [str(each["model"]) for each in arguments]
    return {
        name
        if names.count(name) == 1
        else ", ".join(str(each[part]) for part in ("model", "weights", "layer") if each[part] is not None): Model(
            Explainer(**each), each
        )
        for name, each in zip(names, arguments, strict=True)
    }


@contextmanager
def serving(models: dict[str, Model], host: str, port: int | None) -> Iterator[str]:
    """Serves the page inside the ``with``, and gives its address. What browsers upload is gone afterwards.

    Raises:
        OSError: If the port is taken.
    """
    with TemporaryDirectory(prefix="captum-fusion-") as folder:
        # Where Gradio puts what browsers upload.
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = Page(models).blocks
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                max_file_size=_LARGEST_FILE,
                theme=theme(),
                css=asset("page.css"),
                prevent_thread_lock=True,
                quiet=True,
            )
        except OSError as error:
            where = f"{host}, port {port}" if port else host
            raise OSError(
                f"The page cannot be served at {where}; expected an address of this machine that is free"
            ) from error
        try:
            yield address
        finally:
            blocks.close(verbose=False)
