import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from torchvision.models import WeightsEnum, mobilenet_v2


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_lines_of_the_readme_run(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(__file__).parents[1].joinpath("README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    # Everything as pasted, but for the download of the weights.
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: mobilenet_v2(weights=None).state_dict())
    plt.switch_backend("agg")
    variables: dict[str, object] = {}
    exec(lines, variables)
    assert variables["attributions"].shape == (1, 3, 224, 224)
