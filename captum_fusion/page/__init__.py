"""A page that explains photographs in a browser."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from captum_fusion.explain import Explainer
from captum_fusion.page._browser import Model

_LARGEST_FILE = "50mb"


def load_models(arguments: Sequence[dict[str, Any]]) -> dict[str, Model]:
    """Loads the models that the page offers, by distinct names; the arguments are those of ``Explainer``."""
    names = [str(each["model"]) for each in arguments]
    return {
        name
        if names.count(name) == 1
        else ", ".join(str(each[part]) for part in ("model", "weights", "layer") if each[part] is not None): Model(
            Explainer(**each), each
        )
        for name, each in zip(names, arguments, strict=True)
    }


class _OwnAddress:
    """Answers requests for the page's own address, from its own documents, outside of frames.

    A foreign page that a browser has open could otherwise upload here, frame the page, or read it under a name of its
    own that leads to this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = TrustedHostMiddleware(app, allowed_hosts=list(hosts), www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            await PlainTextResponse("Requests of other pages are refused", status_code=403)(scope, receive, send)
            return

        async def send_unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = "frame-ancestors 'none'"
            await send(message)

        await self._app(scope, receive, send_unframed)


@contextmanager
def serving(models: dict[str, Model], host: str, port: int | None, names: Sequence[str] = ()) -> Iterator[str]:
    """Serves the page inside the ``with``, and yields its address. Uploaded files are deleted afterwards.

    Args:
        models (dict): The models that the page offers.
        host (str): The address to listen on.
        port (int or None): The port to listen on. Default: None, which means the first free one from 7860
        names (list[str], optional): Further host names under which browsers may ask for the page. Default: none

    Raises:
        OSError: If the port is taken.
    """
    # These import Gradio, which takes seconds: a model that cannot be loaded is refused before.
    from captum_fusion.page._events import Page
    from captum_fusion.page._layout import asset, theme

    hosts = ["localhost", "127.0.0.1", "[::1]", host, *names]
    with TemporaryDirectory(prefix="captum-fusion-") as folder:
        # Gradio stores uploaded files here.
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
                app_kwargs={"middleware": [Middleware(_OwnAddress, hosts=hosts)]},
                prevent_thread_lock=True,
                quiet=True,
            )
        except OSError as error:
            where = f"{host}, port {port}" if port else host
            raise OSError(
                f"The page cannot be served at {where}; expected a free address and port of this machine"
            ) from error
        try:
            yield address
        finally:
            blocks.close(verbose=False)
