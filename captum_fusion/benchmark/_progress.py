"""How far a benchmark is, and the means so far."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from captum_fusion.benchmark._records import SHARDS, Key, Record, key_of, parse, with_several_percentiles
from captum_fusion.metrics.means import Mean, mean_of

_SECONDS = 1.0


class Progress(AbstractContextManager["Progress"]):
    """A bar over the explained pictures of all models, and each method's Average Drop and Increase.

    It reads what all processes append to their records, so that it shows the whole; its rate and its remaining time
    are those of this run.

    Args:
        folder (Path): The output folder.
        total (int): How many pictures there are, counting each requested target and each model.
        pending (Mapping): The keys of the records that are still to be made, by the picture.
        done (Mapping): The records that were there before.
        clock (Callable): Tells the seconds. Default: ``time.monotonic``
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        pending: Mapping[tuple[str, ...], set[Key]],
        done: Mapping[Key, Record],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.folder = folder
        self.total = total
        self.pending = {item: set(keys) for item, keys in pending.items()}
        self.before = len(pending)
        self.clock = clock
        self.start = clock()
        self.offsets = {writer: writer.stat().st_size for writer in folder.glob(SHARDS)}
        keys = [*done, *(key for keys in pending.values() for key in keys)]
        self.several = with_several_percentiles(keys)
        self.values: dict[str, dict[str, list[float]]] = {}
        self.bar = Bar(
            TextColumn("pictures"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            auto_refresh=False,
        )
        self.task: TaskID = self.bar.add_task("pictures", total=total, completed=total - self.before, rate="")
        self._count(done.values())
        self.live = Live(self._shown(), refresh_per_second=2, transient=True)
        self.stop = Event()
        self.thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        self.live.start()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.live.stop()

    def _watch(self) -> None:
        while not self.stop.wait(_SECONDS):
            self.poll()

    def poll(self) -> None:
        """Takes in what was appended since."""
        for writer in self.folder.glob(SHARDS):
            with writer.open("rb") as stream:
                stream.seek(self.offsets.get(writer, 0))
                content = stream.read()
            whole = content[: content.rfind(b"\n") + 1]
            self.offsets[writer] = self.offsets.get(writer, 0) + len(whole)
            records = [record for line in whole.splitlines() if (record := parse(line)) is not None]
            for record in records:
                key = key_of(record)
                keys = self.pending.get(key.item, set())
                keys.discard(key)
                if not keys:
                    self.pending.pop(key.item, None)
            self._count(records)
        self.bar.update(self.task, completed=self.total - len(self.pending), rate=self.rate())
        self.live.update(self._shown())

    def rate(self) -> str:
        """The pace of this run, and what remains at this pace."""
        finished, seconds = self.before - len(self.pending), self.clock() - self.start
        if not finished or seconds <= 0:
            return ""
        pace = finished / seconds
        remaining = timedelta(seconds=round(len(self.pending) / pace))
        return f"{pace:.2f} per second, {remaining} left"

    def _count(self, records: Iterable[Record]) -> None:
        for record in records:
            values = self.values.setdefault(
                key_of(record).label(self.several), {"confidence_drop": [], "confidence_increase": []}
            )
            for name, numbers in values.items():
                number: Any = record.get(name)
                if number is not None:
                    numbers.append(100 * number)

    def _shown(self) -> Group:
        table = Table("method", "Average Drop", "Average Increase", "pictures")
        for method, values in self.values.items():
            drop, increase = (mean_of(numbers) for numbers in values.values())
            table.add_row(method, _short(drop), _short(increase), str(drop.examples))
        return Group(self.bar, table)


def _short(mean: Mean) -> str:
    return f"{mean.mean:.1f} ± {mean.standard_error:.1f}" if mean.examples > 1 else ""
