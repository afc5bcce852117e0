"""The lines of Python that reproduce what the page shows."""

from captum_fusion._app.drawing import COLOURS
from captum_fusion._app.messages import printable
from captum_fusion.page._browser import View


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
