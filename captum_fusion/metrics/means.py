"""Means of the metrics over a dataset."""

from collections.abc import Iterable
from math import nan, sqrt
from statistics import fmean, stdev
from typing import NamedTuple
from uuid import uuid4

from torch import Tensor

_NAMES = (
    "confidence_drop",
    "confidence_increase",
    "insertion",
    "deletion",
    "road",
    "coherency",
    "complexity",
    "adcc",
    "arcc",
)
# The means that papers report in percent, with their names.
_IN_PERCENT = {
    "confidence_drop": "average_drop",
    "confidence_increase": "average_increase",
    "coherency": "coherency",
    "complexity": "complexity",
    "adcc": "adcc",
    "arcc": "arcc",
}


class Mean(NamedTuple):
    """A mean over examples with its standard error."""

    mean: float
    """NaN without examples."""
    standard_error: float
    """The sample standard deviation over the square root of the number of examples; NaN for fewer than two."""
    examples: int
    """The number of examples."""


class DatasetMeans:
    """Collects metrics batch by batch and computes their means as papers report them.

    Average Drop and Average Increase, in percent, are the means of ``confidence_drop`` and ``confidence_increase``
    times 100. Coherency, complexity, ADCC and ARCC are in percent, too. Overall is the mean of insertion minus
    deletion, example by example. Sums are exact, so the division into batches or processes changes nothing.

    Examples::

        >>> import torch
        >>> means = DatasetMeans()
        >>> means.update(confidence_drop=torch.tensor([0.5, 0.25]), confidence_increase=torch.tensor([0.0, 1.0]))
        >>> means.compute()["average_drop"]
        Mean(mean=37.5, standard_error=12.5, examples=2)
    """

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {name: [] for name in (*_NAMES, "overall")}
        # A name for the first batch, which copies share, and those of the means that were merged.
        self._sources: set[str] = set()

    def update(
        self,
        confidence_drop: Tensor | None = None,
        confidence_increase: Tensor | None = None,
        insertion: Tensor | None = None,
        deletion: Tensor | None = None,
        road: Tensor | None = None,
        coherency: Tensor | None = None,
        complexity: Tensor | None = None,
        adcc: Tensor | None = None,
        arcc: Tensor | None = None,
    ) -> None:
        """Adds the metrics of a batch.

        Args:
            confidence_drop (Tensor, optional): Shape (N,). Default: None
            confidence_increase (Tensor, optional): Shape (N,). Default: None
            insertion (Tensor, optional): Shape (N,). Default: None
            deletion (Tensor, optional): Shape (N,). Default: None
            road (Tensor, optional): Shape (N,). Default: None
            coherency (Tensor, optional): Shape (N,). Default: None
            complexity (Tensor, optional): Shape (N,). Default: None
            adcc (Tensor, optional): Shape (N,). Default: None
            arcc (Tensor, optional): Shape (N,). Default: None

        Raises:
            ValueError: If the metrics have different numbers of examples, or if a value is not finite.
        """
        metrics = (confidence_drop, confidence_increase, insertion, deletion, road, coherency, complexity, adcc, arcc)
        batch = dict(zip(_NAMES, metrics, strict=True))
        present = {name: values for name, values in batch.items() if values is not None}
        shapes = {name: tuple(values.shape) for name, values in present.items()}
        if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise ValueError(f"The metrics have shapes {shapes}; expected one value for each example, (N,)")
        for name, values in present.items():
            if not values.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite; expected numbers")
        if present and not self._sources:
            self._sources = {uuid4().hex}
        for name, values in present.items():
            self.values[name] += values.tolist()
        if insertion is not None and deletion is not None:
            self.values["overall"] += (insertion.double() - deletion.double()).tolist()

    def merge(self, others: Iterable["DatasetMeans"]) -> None:
        """Adds the examples of other means, such as those of other processes.

        ``torch.distributed.all_gather_object`` collects the means of all processes, the own ones among them, so merge
        its list into empty means.

        Args:
            others (iterable of DatasetMeans): The means of other examples.

        Raises:
            ValueError: If examples would count twice, because two of these means are copies of the same ones.

        Examples::

            >>> import torch
            >>> gathered = [DatasetMeans(), DatasetMeans()]
            >>> gathered[0].update(insertion=torch.tensor([1.0, 0.5]))
            >>> gathered[1].update(insertion=torch.tensor([0.0]))
            >>> total = DatasetMeans()
            >>> total.merge(gathered)
            >>> total.compute()["insertion"].mean
            0.5
        """
        others = list(others)
        sources = [self._sources, *(other._sources for other in others)]
        merged = set().union(*sources)
        if len(merged) < sum(map(len, sources)):
            raise ValueError(
                "Two of the means are copies of the same ones, such as one's own in the list of all_gather_object; "
                "expected means of other examples. Merge that list into empty means: total = DatasetMeans(); "
                "total.merge(gathered)."
            )
        self._sources = merged
        for other in others:
            for name, values in other.values.items():
                self.values[name] += values

    def compute(self) -> dict[str, Mean]:
        """Computes the means with their standard errors.

        Returns:
            *dict* of average_drop, average_increase, coherency, complexity, adcc and arcc in percent, insertion,
            deletion, overall and road, each only if ``update`` received its metric.
        """
        return {
            _IN_PERCENT.get(name, name): mean_of([(100 if name in _IN_PERCENT else 1) * value for value in values])
            for name, values in self.values.items()
            if values
        }


def mean_of(values: list[float]) -> Mean:
    """The mean of values and its standard error, both from exact sums.

    Examples::

        >>> mean_of([1.0, 2.0, 3.0, 6.0]).mean
        3.0
    """
    count = len(values)
    return Mean(fmean(values) if values else nan, stdev(values) / sqrt(count) if count > 1 else nan, count)
