"""The package as a whole: its public names come on their first use, and a failed import says why."""

import sys

import pytest

import captum_fusion


@pytest.mark.parametrize("error", [AttributeError, ImportError, RuntimeError])
def test_a_broken_dependency_is_named(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "captum_fusion._public":
                raise error("torchvision is built for another torch")

    monkeypatch.delitem(sys.modules, "captum_fusion._public", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    expected = ImportError if error is AttributeError else error
    with pytest.raises(expected, match="torchvision is built for another torch"):
        from captum_fusion import LayerFusionCam  # noqa: F401
    with pytest.raises(expected, match="torchvision is built for another torch"):
        captum_fusion.LayerFusionCam  # noqa: B018
