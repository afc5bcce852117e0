"""What one browser looks at, and what runs for it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from captum_fusion._photograph import Photograph
from captum_fusion._progress import Listener, Progress, Stopped, progress_to
from captum_fusion.explain import Explainer, Explanation, OpenedPicture


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
        self.newest_run = 0
        self._photograph: Photograph | None = None
        self._pictures: dict[str, OpenedPicture] = {}

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

    def stop(self) -> None:
        """Ends what runs."""
        self.newest_run += 1


class Run:
    """Work for a browser. It ends what was running for it before, which then raises ``Stopped`` between two passes."""

    def __init__(self, session: Session, listener: Listener) -> None:
        session.stop()
        self.session = session
        self._number = session.newest_run
        self._listener = listener

    def _hear(self, progress: Progress) -> None:
        if self._number != self.session.newest_run:
            raise Stopped
        self._listener(progress)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Tells the listener of the passes inside, unless the run has been ended."""
        with progress_to(self._hear):
            self._hear(Progress("Starting", 0, 1))
            yield
            self._hear(Progress("Starting", 0, 1))
