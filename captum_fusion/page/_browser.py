"""What one browser looks at, and what runs for it."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, NamedTuple

from captum_fusion._app.images import Photograph
from captum_fusion._engine.progress import Listener, Progress, Stopped, progress_to
from captum_fusion.explain import ClassifiedImage, Explainer, Explanation

# Who waits for an older run to end looks that often whether a newer one has begun.
_PATIENCE_SECONDS = 0.05


class Model(NamedTuple):
    """A model to choose, and the arguments that ``Explainer`` took for it."""

    explainer: Explainer
    arguments: Mapping[str, Any]


class View(NamedTuple):
    """What a run that has ended shows, and what Python makes it of."""

    picture: ClassifiedImage
    explanations: Sequence[Explanation]
    """One for each class."""
    model: Mapping[str, Any]
    """The arguments of the model."""
    python: Sequence[str]
    """How Python opens the photograph: imports, and an expression."""


class _Taken(NamedTuple):
    """A photograph, how Python opens it, and what each model sees in it."""

    photograph: Photograph
    python: Sequence[str]
    pictures: dict[str, ClassifiedImage]


class Session:
    """What one browser looks at.

    What is done in the browser arrives in any order, and while something runs. So it is taken in as soon as it arrives,
    and what runs is ended for a run that sees all of it.
    """

    def __init__(self) -> None:
        self.settings: Any = None
        """What the controls said at the latest action."""
        self.shown: View | None = None
        """What is shown, unless something runs or was stopped."""
        self.listed: ClassifiedImage | None = None
        """Whose classes the browser can choose from."""
        self._taken: _Taken | None = None
        self._chosen: tuple[str, list[int]] | None = None
        self._latest = self._stopped = -inf
        self._newest_run = 0
        self._state, self._turn = threading.Lock(), threading.Lock()

    def __deepcopy__(self, _: object) -> "Session":
        """Gradio copies the first one for each browser."""
        return Session()

    def set(self, action: float, settings: Any) -> None:
        """Takes what the controls say, unless those of a later action are there."""
        with self._state:
            if action > self._latest:
                self._latest, self.settings = action, settings

    def look_at(self, photograph: Photograph, python: Sequence[str]) -> None:
        """Takes another photograph, for which no class is chosen."""
        self._taken, self._chosen = _Taken(photograph, python, {}), None

    def choose(self, model: str, targets: Sequence[int]) -> None:
        """Chooses classes of a model."""
        self._chosen = model, list(targets)

    def chosen(self, model: str) -> list[int] | None:
        """The classes that were chosen of the model, if any were."""
        return list(self._chosen[1]) if self._chosen and self._chosen[0] == model else None

    def picture(self, name: str, model: Model) -> tuple[ClassifiedImage, Sequence[str]]:
        """The photograph in the eyes of a model, and how Python opens it."""
        taken = self._taken
        if taken is None:
            raise ValueError("There is no photograph yet; choose one")
        if name not in taken.pictures:
            taken.pictures[name] = model.explainer.open(taken.photograph)
        return taken.pictures[name], taken.python

    def stop(self, action: float) -> None:
        """Ends what runs, and what is yet to run for earlier actions."""
        with self._state:
            self._stopped = max(self._stopped, action)
            self._newest_run += 1

    @contextmanager
    def run(self, action: float, listener: Listener) -> Iterator["Run"]:
        """Work for an action. It ends what ran before, and begins when that has ended.

        Raises:
            Stopped: If another one was begun meanwhile, or a later action was to stop.
        """
        with self._state:
            if action < self._stopped:
                raise Stopped
            self._newest_run += 1
            run = Run(self, self._newest_run, listener)
        while not self._turn.acquire(timeout=_PATIENCE_SECONDS):
            run.check()
        try:
            run.check()
            self.shown = None
            yield run
        finally:
            self._turn.release()


class Run:
    """Work for a browser, which raises ``Stopped`` between two passes when it is to end."""

    def __init__(self, session: Session, number: int, listener: Listener) -> None:
        self.session = session
        self._number = number
        self._listener = listener

    def check(self) -> None:
        """Raises ``Stopped`` if the work is to end."""
        if self._number != self.session._newest_run:
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
