"""Tabs of browsers: the photograph, the settings and the running work of each."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from captum_fusion import Progress, Stopped, progress_to
from captum_fusion._app.images import Photograph
from captum_fusion.explain import ClassifiedImage, Explainer, Explanation

# A run that waits for an older one to end checks this often whether a newer one has begun.
_PATIENCE_SECONDS = 0.05
NO_PANEL = (-inf, "")
# A reload closes a tab and opens it again within this time.
_RELOAD_SECONDS = 20.0


@dataclass(frozen=True)
class Model:
    """A model that the page offers, with the arguments of its ``Explainer``; tabs take turns with it."""

    explainer: Explainer
    arguments: Mapping[str, Any]
    turn: threading.Lock = field(default_factory=threading.Lock, compare=False)


class View(NamedTuple):
    """The result of a finished run, and the Python that reproduces it."""

    image: ClassifiedImage
    explanations: Sequence[Explanation]
    """One for each class."""
    model: Model
    python: Sequence[str]
    """The lines that open the photograph in Python: imports, then an expression."""


class Tab:
    """The state of one tab.

    Events of a browser arrive in any order, also while something runs. So each is stored on arrival, and what runs is
    ended for a run that sees all of them.
    """

    def __init__(self) -> None:
        self.settings: Any = None
        """The values of the controls at the latest action."""
        self.view: View | None = None
        """The view on display; None while something runs, and after a stop."""
        self.judged: View | None = None
        """The view whose curves are on display."""
        self.open_panel = NO_PANEL
        """The panel that was opened last, after the number of that action."""
        self.listed: ClassifiedImage | None = None
        """The image whose classes the tab offers."""
        self._photograph: Photograph | None = None
        self._python: Sequence[str] = ()
        self._images: dict[str, ClassifiedImage] = {}
        self._targets: tuple[str, list[int]] | None = None
        self._latest = self._stopped = -inf
        self._newest_run = 0
        self._state, self._turn = threading.Lock(), threading.Lock()

    @property
    def is_empty(self) -> bool:
        """Whether the tab has no photograph."""
        return self._photograph is None and not self._images

    def set(self, action: float, settings: Any) -> None:
        """Stores the values of the controls, unless those of a later action are stored."""
        with self._state:
            if action > self._latest:
                self._latest, self.settings = action, settings

    def look_at(self, photograph: Photograph, python: Sequence[str]) -> None:
        """Stores another photograph, and drops the classes that were chosen."""
        self._photograph, self._python, self._images, self._targets = photograph, python, {}, None

    def choose(self, model: str, targets: Sequence[int]) -> None:
        """Stores the chosen classes of a model."""
        self._targets = model, list(targets)

    def targets(self, model: str) -> list[int] | None:
        """The chosen classes of a model; None if none were chosen."""
        return list(self._targets[1]) if self._targets and self._targets[0] == model else None

    def image(self, name: str, models: Mapping[str, Model]) -> tuple[ClassifiedImage, Sequence[str]]:
        """The photograph as a model sees it, and the Python that opens it."""
        if self.is_empty:
            raise ValueError("There is no photograph yet; choose one")
        photograph, images = self._photograph, self._images
        if name not in images:
            images[name] = models[name].explainer.open(photograph)
        if images.keys() == models.keys() and images is self._images:
            # Every model has its own small copy; the photograph itself may take 150 MB.
            self._photograph = None
        return images[name], self._python

    def stop(self, action: float = inf) -> None:
        """Ends what runs, and what is yet to run for earlier actions."""
        with self._state:
            self._stopped = max(self._stopped, action)
            self._newest_run += 1

    @contextmanager
    def run(self, action: float, listener: Callable[[Progress], object]) -> Iterator["Run"]:
        """Runs work for an action. It ends the older run, and begins when that has ended.

        Raises:
            Stopped: If a newer run has begun meanwhile, or a later action was to stop.
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
            self.view = None
            yield run
        finally:
            self._turn.release()


class Run:
    """Work for a tab; raises ``Stopped`` between two passes when it is to end."""

    def __init__(self, tab: Tab, number: int, listener: Callable[[Progress], object]) -> None:
        self.tab = tab
        self._number = number
        self._listener = listener

    def check(self) -> None:
        """Raises ``Stopped`` if the work is to end."""
        if self._number != self.tab._newest_run:
            raise Stopped

    @contextmanager
    def step(self, model: Model) -> Iterator[None]:
        """Waits for the model's turn, and reports the passes inside the ``with`` to the listener."""

        def listen(progress: Progress) -> None:
            self.check()
            self._listener(progress)

        while not model.turn.acquire(timeout=_PATIENCE_SECONDS):
            listen(Progress("Waiting for another tab", 0, 1))
        try:
            with progress_to(listen):
                self.check()
                yield
                self.check()
        finally:
            model.turn.release()


class Tabs:
    """All open tabs, by the name that each browser gives its tab and keeps over a reload.

    A tab that is closed, and not opened again at once, loses its photograph and its maps.
    """

    def __init__(self) -> None:
        self._tabs: dict[str, Tab] = {}
        self._connections: dict[str, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tabs)

    def connect(self, name: str, connection: str) -> Tab:
        """The tab of this name, which a connection of the server belongs to."""
        with self._lock:
            self._connections[connection] = name
            return self._tabs.setdefault(name, Tab())

    def disconnect(self, connection: str) -> None:
        """Ends what runs for a connection's tab, and forgets the tab unless it is reloaded."""
        with self._lock:
            name = self._connections.pop(connection, None)
            tab = self._tabs.get(name or "")
            if name is None or tab is None or name in self._connections.values():
                return
        tab.stop(tab._latest)
        timer = threading.Timer(_RELOAD_SECONDS, self._forget, [name])
        timer.daemon = True
        timer.start()

    def _forget(self, name: str) -> None:
        with self._lock:
            if name not in self._connections.values() and (tab := self._tabs.pop(name, None)):
                tab.stop()
