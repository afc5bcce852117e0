"""Files to download."""

import re
import zipfile
from io import BytesIO

from captum_fusion._app.drawing import drawn
from captum_fusion._app.output_files import archive
from captum_fusion.explain import Explanation
from captum_fusion.page._browser import View
from captum_fusion.page._recipe import recipe


def picture(shown: View, overlay: float) -> tuple[str, bytes]:
    """The maps over the photograph, as the command draws them."""
    return "explained.png", drawn(shown.explanations, ".png", overlay)


def maps(shown: View, _: float) -> tuple[str, bytes]:
    """The raw maps, in the archive that the command writes; for two classes one such archive for each."""
    archives = {_file_name(each): archive(each) for each in shown.explanations}
    if len(archives) == 1:
        return archives.popitem()
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, part in archives.items():
            file.writestr(name, part)
    return "maps.zip", content.getvalue()


def python(shown: View, overlay: float) -> tuple[str, bytes]:
    """The lines of Python that reproduce what is shown."""
    return "explained.py", recipe(shown, overlay).encode()


def _file_name(explanation: Explanation) -> str:
    return re.sub(r"\W+", "_", f"{explanation.target} {explanation.category}") + ".npz"
