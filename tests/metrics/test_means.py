import math
import pickle
import statistics

import pytest
import torch

from captum_fusion.metrics import DatasetMeans


def metrics(count: int) -> dict[str, torch.Tensor]:
    names = ("confidence_drop", "confidence_increase", "insertion", "deletion")
    return {name: torch.rand(count) for name in names}


def test_means_and_standard_errors() -> None:
    values = metrics(20)
    means = DatasetMeans()
    means.update(**values)
    computed = means.compute()
    expected = {
        "average_drop": 100 * values["confidence_drop"].double(),
        "average_increase": 100 * values["confidence_increase"].double(),
        "insertion": values["insertion"].double(),
        "deletion": values["deletion"].double(),
        "overall": values["insertion"].double() - values["deletion"].double(),
    }
    assert computed.keys() == expected.keys()
    for name, numbers in expected.items():
        assert computed[name].mean == pytest.approx(statistics.mean(numbers.tolist()))
        assert computed[name].standard_error == pytest.approx(statistics.stdev(numbers.tolist()) / math.sqrt(20))
        assert computed[name].examples == 20


@pytest.mark.parametrize("size", [1, 3, 7])
def test_exactly_the_same_however_the_data_are_divided(size: int) -> None:
    values = metrics(20)
    whole = DatasetMeans()
    whole.update(**values)
    processes = [DatasetMeans(), DatasetMeans(), DatasetMeans()]
    for batch in range(0, 20, size):
        part = {name: numbers[batch : batch + size] for name, numbers in values.items()}
        processes[batch % 3].update(**part)
    first, *others = (pickle.loads(pickle.dumps(process)) for process in processes)
    first.merge(others)
    assert first.compute() == whole.compute()


def test_no_example_counts_twice() -> None:
    own, other = DatasetMeans(), DatasetMeans()
    own.update(insertion=torch.tensor([0.9, 0.8]))
    other.update(insertion=torch.tensor([0.9, 0.8]))
    gathered = pickle.loads(pickle.dumps([other, own]))
    for means, others in ((own, gathered), (own, [own]), (DatasetMeans(), [other, *gathered])):
        before = means.compute()
        with pytest.raises(ValueError, match="Two of the means are copies of the same ones"):
            means.merge(others)
        assert means.compute() == before
    total = DatasetMeans()
    total.merge(gathered)
    assert total.compute()["insertion"].examples == 4
    with pytest.raises(ValueError, match="are copies"):
        own.merge([total])
    # Copies of empty means, as processes get them, are means of their own.
    first = DatasetMeans()
    others = [pickle.loads(pickle.dumps(first)) for _ in range(2)]
    for means in (first, *others):
        means.update(insertion=torch.tensor([0.5]))
    first.merge(others)
    assert first.compute()["insertion"].examples == 3


def test_metrics_that_were_not_given_are_left_out() -> None:
    means = DatasetMeans()
    assert means.compute() == {}
    means.update(insertion=torch.tensor([0.5]))
    assert means.compute().keys() == {"insertion"}
    assert math.isnan(means.compute()["insertion"].standard_error)


def test_what_else_papers_report() -> None:
    means = DatasetMeans()
    numbers = torch.tensor([0.25, 0.75])
    means.update(road=numbers, coherency=numbers, complexity=numbers, adcc=numbers, arcc=numbers)
    found = {name: mean.mean for name, mean in means.compute().items()}
    assert found == {"road": 0.5, "coherency": 50, "complexity": 50, "adcc": 50, "arcc": 50}


def test_refuses() -> None:
    means = DatasetMeans()
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\).*expected one value for each example"):
        means.update(insertion=torch.rand(2), deletion=torch.rand(3))
    with pytest.raises(ValueError, match="insertion holds values that are not finite"):
        means.update(insertion=torch.tensor([torch.nan]))
    assert means.compute() == {}
