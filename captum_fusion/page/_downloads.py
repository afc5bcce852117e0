"""Files to download, and the Python that reproduces a view."""

import re
import zipfile
from io import BytesIO

from captum_fusion._app.drawing import COLOURS, draw
from captum_fusion._app.messages import printable
from captum_fusion._app.output_files import archive
from captum_fusion.explain import Explanation
from captum_fusion.page._browser import View


def picture(shown: View, overlay: float) -> tuple[str, bytes]:
    """The maps over the photograph, as the command draws them."""
    return "explained.png", draw(shown.explanations, ".png", overlay)


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


def recipe(shown: View, overlay: float) -> str:
    """Writes the lines that compute and draw a view.

    Args:
        shown (View): The view.
        overlay (float): The opacity of the colours over the photograph, in [0, 1].
    """
    first = shown.explanations[0]
    *imports, image = shown.python
    model = ", ".join(f"{name}={value!r}" for name, value in shown.model.arguments.items() if value is not None)
    settings = f"percentile={first.percentile!r}, weighting={first.weighting!r}, tolerance={first.tolerance!r}"
    # A line break would end the comment and begin code.
    names = printable(" and ".join(explanation.category for explanation in shown.explanations))
    lines = [
        *sorted(["from captum.attr import visualization", "from captum_fusion.explain import Explainer", *imports]),
        "",
        f"picture = Explainer({model}).open({image})",
        f"for target in {[explanation.target for explanation in shown.explanations]}:  # {names}",
        f"    explanation = picture.explain(target, {list(first.maps)}, {settings})",
        "    photograph = explanation.pixels[0].permute(1, 2, 0).numpy()",
        "    for name, values in explanation.maps.items():",
        '        style = dict(sign="positive", outlier_perc=0, title=name, '
        f'cmap="{COLOURS}", alpha_overlay={overlay:g})',
        "        heat = values[0].permute(1, 2, 0).numpy()",
        '        visualization.visualize_image_attr(heat, photograph, "blended_heat_map", **style)',
    ]
    return "\n".join(lines) + "\n"
