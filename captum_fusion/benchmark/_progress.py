"""How far a benchmark is, and the means so far."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from captum_fusion.benchmark._records import Record, key_of
from captum_fusion.metrics.means import Mean, mean_of


class Progress(AbstractContextManager["Progress"]):
    """A bar over the explained pictures of all models with its rate, and each method's Average Drop and Increase.

    Args:
        total (int): How many pictures there are, counting each requested target and each model.
        methods (list[str]): The labels of the methods.
        done (Iterable): Records that were there before.
    """

    def __init__(self, total: int, methods: Sequence[str], done: Iterable[Record]) -> None:
        self.methods = methods
        self.missing: dict[tuple[str, str, str], int] = {}
        self.values: dict[str, dict[str, list[float]]] = {
            method: {"confidence_drop": [], "confidence_increase": []} for method in methods
        }
        self.bar = Bar(
            TextColumn("pictures"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.task: TaskID = self.bar.add_task("pictures", total=total, rate="")
        self.live = Live(self._shown(), refresh_per_second=2, transient=True)
        self.add(done)

    def __enter__(self) -> "Progress":
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def add(self, records: Iterable[Record]) -> None:
        """Counts new records."""
        for record in records:
            piece = key_of(record)[:3]
            self.missing[piece] = self.missing.get(piece, len(self.methods)) - 1
            if self.missing[piece] == 0:
                self.bar.advance(self.task)
            for name, values in self.values[record["method"]].items():
                if name in record:
                    values.append(100 * record[name])
        speed = self.bar.tasks[0].speed
        self.bar.update(self.task, rate=f"{speed:.2f} per second" if speed else "")
        self.live.update(self._shown())

    def _shown(self) -> Group:
        table = Table("method", "Average Drop", "Average Increase", "pictures")
        for method, values in self.values.items():
            drop, increase = (mean_of(numbers) for numbers in values.values())
            table.add_row(method, _short(drop), _short(increase), str(drop.examples))
        return Group(self.bar, table)


def _short(mean: Mean) -> str:
    return f"{mean.mean:.1f} ± {mean.standard_error:.1f}" if mean.examples > 1 else ""
