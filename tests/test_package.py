"""The package as a whole: its public names come on their first use, and a failed import says why."""

import subprocess
import sys

import pytest

_BROKEN = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision.ops":
            raise {error}("torchvision is built for another torch")

sys.meta_path.insert(0, Broken())
{statement}
"""


@pytest.mark.parametrize("error", ["AttributeError", "ImportError", "RuntimeError"])
@pytest.mark.parametrize(
    "statement",
    ["from captum_fusion import LayerFusionCam", "import captum_fusion; captum_fusion.LayerFusionCam"],
    ids=["from", "attribute"],
)
def test_a_broken_dependency_is_named(error: str, statement: str) -> None:
    code = _BROKEN.format(error=error, statement=statement)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "torchvision is built for another torch" in process.stderr.splitlines()[-1]
