"""The progress of a benchmark on standard error, with the means so far."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from time import monotonic

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from scipy.stats import sem

from captum_fusion._app.settings import MEASURES
from captum_fusion.benchmark._records import PATTERN, Key, Record, key_of, read_lines, with_several_percentiles

# Seconds between two updates of a terminal, and between two lines where there is none.
_TERMINAL, _LINES = 0.5, 30.0


class ProgressReport(AbstractContextManager["ProgressReport"]):
    """A bar over the images of all models and each method's means on a terminal, else a line every half minute.

    ``total`` counts each requested target and each model; ``pending`` holds the keys of the missing records, by the
    image; ``own`` is the file of this process, which reads those of the others. The pace is that of this run.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        pending: Mapping[tuple[str, ...], set[Key]],
        done: Mapping[Key, Record],
        metrics: Iterable[str],
        own: Path,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.folder, self.total, self.own, self.clock = folder, total, own, clock
        self.pending = {item: set(keys) for item, keys in pending.items()}
        self.before = len(pending)
        self.start = self.last = clock()
        self.offsets = {file: file.stat().st_size for file in folder.glob(PATTERN)}
        self.several = with_several_percentiles([*done, *(key for keys in pending.values() for key in keys)])
        self.measures = {
            name: measure
            for name, measure in MEASURES.items()
            if measure.metric in set(metrics) and name != "overall"  # The records hold its parts.
        }
        self.values: dict[str, dict[str, list[float]]] = {}
        self._collect(done.values())
        console = Console(stderr=True)
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(self.table(), console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "ProgressReport":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def add(self, records: Iterable[Record]) -> None:
        """Counts records that were appended, and shows the progress where it is time."""
        self._collect(records)
        if self.clock() - self.last < (_TERMINAL if self.live else _LINES):
            return
        self.last = self.clock()
        for file in self.folder.glob(PATTERN):
            if file != self.own:
                lines = list(read_lines(file, self.offsets.get(file, 0)))
                self.offsets[file] = self.offsets.get(file, 0) + sum(len(content) for _, content, _ in lines)
                self._collect(record for _, _, record in lines if record is not None)
        if self.live:
            self.live.update(self.table(), refresh=True)
        else:
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"captum-fusion: {self.line()}")

    def line(self) -> str:
        """The images that are done, the pace of this run, and the time that remains at this pace."""
        line = f"{self.total - len(self.pending)} of {self.total} images"
        finished, seconds = self.before - len(self.pending), self.clock() - self.start
        if not finished or seconds <= 0:
            return line
        remaining = timedelta(seconds=round(len(self.pending) * seconds / finished))
        return f"{line}, {finished / seconds:.2f} per second, {remaining} left"

    def table(self) -> Group:
        """The bar and the means so far."""
        table = Table("method", *(f"{measure.short} {measure.arrow}" for measure in self.measures.values()), "images")
        for method, values in self.values.items():
            cells = [
                f"{sum(numbers) / len(numbers):.3g} ± {sem(numbers):.2g}" if len(numbers) > 1 else ""
                for numbers in values.values()
            ]
            table.add_row(method, *cells, str(max(map(len, values.values()))))
        return Group(self.line(), ProgressBar(self.total, self.total - len(self.pending)), table)

    def _collect(self, records: Iterable[Record]) -> None:
        for record in records:
            key = key_of(record)
            keys = self.pending.get(key.item, set())
            keys.discard(key)
            if not keys:
                self.pending.pop(key.item, None)
            values = self.values.setdefault(key.label(self.several), {name: [] for name in self.measures})
            for name, measure in self.measures.items():
                number = dict(record).get(measure.column)
                if isinstance(number, (int, float)):
                    values[name].append(measure.scale * number)
