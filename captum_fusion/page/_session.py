"""What one browser looks at, and what runs for it."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from captum_fusion._photograph import Photograph
from captum_fusion._progress import Listener, Progress, Stopped, progress_to
from captum_fusion.explain import Explainer, Explanation, OpenedPicture

# Who waits for an older run to end looks that often whether a newer one has begun.
_PATIENCE_SECONDS = 0.05


class Model(NamedTuple):
    """A model to choose, and the arguments that ``Explainer`` took for it."""

    explainer: Explainer
    arguments: Mapping[str, Any]


class Session:
    """What one browser looks at."""

    def __init__(self) -> None:
        self.explanations: list[Explanation] = []
        """What is shown, one for each class."""
        self.python: Sequence[str] = ()
        """How Python opens the photograph: imports, and an expression."""
        self.model: Mapping[str, Any] = {}
        """The arguments of the model that is explained."""
        self._photograph: Photograph | None = None
        self._pictures: dict[str, OpenedPicture] = {}
        self._newest: float = 0
        self._turn = threading.Lock()

    def __deepcopy__(self, _: object) -> "Session":
        """Gradio copies the first one for each browser."""
        return Session()

    def look_at(self, photograph: Photograph, python: Sequence[str]) -> None:
        """Takes another photograph."""
        self._photograph, self.python, self._pictures, self.explanations = photograph, python, {}, []

    def picture(self, name: str, model: Model) -> OpenedPicture:
        """The photograph in the eyes of a model."""
        if self._photograph is None:
            raise ValueError("There is no photograph yet; choose one")
        if name not in self._pictures:
            self._pictures[name] = model.explainer.open(self._photograph)
        self.model = model.arguments
        return self._pictures[name]

    def stop(self, action: float) -> None:
        """Ends what runs for actions before this one. They arrive in any order."""
        self._newest = max(self._newest, action)

    @contextmanager
    def run(self, action: float, listener: Listener) -> Iterator["Run"]:
        """Work for an action in the browser. It ends what ran for those before, and begins when that has ended.

        Raises:
            Stopped: If there was a later action meanwhile.
        """
        self.stop(action)
        run = Run(self, action, listener)
        while not self._turn.acquire(timeout=_PATIENCE_SECONDS):
            run.check()
        try:
            run.check()
            yield run
        finally:
            self._turn.release()


class Run:
    """Work for a browser, which raises ``Stopped`` between two passes when it is to end."""

    def __init__(self, session: Session, action: float, listener: Listener) -> None:
        self.session = session
        self._action = action
        self._listener = listener

    def check(self) -> None:
        """Raises ``Stopped`` if the work is to end."""
        if self._action < self.session._newest:
            raise Stopped

    @contextmanager
    def step(self) -> Iterator[None]:
        """Tells the listener of the passes inside."""

        def hear(progress: Progress) -> None:
            self.check()
            self._listener(progress)

        with progress_to(hear):
            self.check()
            yield
            self.check()
