import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from torch import Tensor
from torchvision.models import WeightsEnum, mobilenet_v2


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_lines_of_the_readme_run(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(__file__).parents[1].joinpath("README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)

    def random_weights(*_: object, **__: object) -> dict[str, Tensor]:
        state = mobilenet_v2(weights=None).state_dict()
        # All but some of the last layer's channels are constant, and cost no pass.
        state["features.18.1.weight"][32:] = 0
        return state

    # Everything as pasted, but for the download of the weights.
    monkeypatch.setattr(WeightsEnum, "get_state_dict", random_weights)
    plt.switch_backend("agg")
    variables: dict[str, object] = {}
    exec(lines, variables)
    assert variables["attributions"].shape == (1, 3, 224, 224)
