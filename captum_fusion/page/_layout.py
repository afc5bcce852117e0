"""Layout of the page."""

from collections.abc import Sequence
from importlib.metadata import metadata
from importlib.resources import files
from typing import Any

import gradio as gr

from captum_fusion._app.methods import METHODS
from captum_fusion._app.options import DEFAULT_ALPHA
from captum_fusion.arguments import WEIGHTINGS
from captum_fusion.page import _panels as panels
from captum_fusion.page._samples import Sample

MOST_CLASSES = 2
CURVES = "Curves"
"""The name of the tab whose content is computed only while it is open."""
_TOLERANCE = 0.05
_METHODS = ["grad-cam", "score-cam", "fusion-cam"]


def asset(name: str) -> str:
    """One of the page's scripts or styles."""
    return files("captum_fusion.page").joinpath(name).read_text(encoding="utf-8")


def theme() -> gr.Theme:
    """Quiet colours beside those of the maps, and fonts that ship with Gradio."""
    # Of the weights that ship, only these have all letters.
    sans, mono = (gr.themes.utils.fonts.LocalFont(f"IBM Plex {kind}", weights=(400, 700)) for kind in ("Sans", "Mono"))
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=(sans, "ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=(mono, "ui-monospace", "monospace"),
    ).set(
        # Gradio's own grey has a contrast of 2.6:1 on white; WCAG AA asks for 4.5:1.
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_600",
    )


class Layout:
    """The parts of the page, inside a ``gr.Blocks``."""

    def __init__(self, models: Sequence[str], samples: Sequence[Sample]) -> None:
        # The first component, since Gradio hands the values to scripts in the order of the components.
        self.action = gr.Textbox(visible=False)
        # The paper, and what else the project declares as its addresses, such as its guide.
        addresses = [each.split(", ", 1) for each in metadata("captum-fusion").get_all("Project-URL") or ()]
        gr.Markdown(
            "# captum-fusion\nThe maps show which regions of a photograph support a class: red supports it most. "
            + " · ".join(f"[{name}]({address})" for name, address in addresses),
            elem_id="title",
        )
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=1, min_width=300, elem_id="choices"):
                self._choices(models, samples)
            with gr.Column(scale=3, min_width=320):
                self._views()
                self._settings()
        self.download = gr.HTML("", html_template="", js_on_load=asset("download.js"), min_height=0)

    def _choices(self, models: Sequence[str], samples: Sequence[Sample]) -> None:
        buttons: Any = {
            "html_template": "<div class='choices'></div>",
            "js_on_load": asset("choice.js"),
            "apply_default_css": False,
        }
        gr.Markdown("**1. Photograph**: one of these, or your own", elem_classes="step")
        self.sample = gr.HTML(panels.pictures(samples), **buttons)
        self.upload = gr.File(file_types=["image"], show_label=False, height=124, elem_id="upload")
        self.model = gr.Dropdown(list(models), label="Model", visible=len(models) > 1)
        gr.Markdown("**2. Class**: click one; + adds a second one", elem_classes="step")
        self.bars = gr.HTML(panels.NO_CLASSES, **buttons)
        gr.Markdown("**3. Methods** to compare, or any other class", elem_classes="step")
        with gr.Column(elem_id="request"):
            self.classes = gr.Dropdown(
                [], multiselect=True, max_choices=MOST_CLASSES, label="Classes", info="One, or two side by side"
            )
            self.methods = gr.Dropdown(
                list(METHODS),
                value=_METHODS,
                multiselect=True,
                allow_custom_value=True,
                label="Methods",
                info="Also fusion(gradient,region) of any two",
            )

    def _views(self) -> None:
        with gr.Row(elem_id="progress"):
            self.status = gr.HTML(
                "", html_template="<p role='status'></p>", js_on_load=asset("status.js"), min_height=56
            )
            self.stop = gr.Button("Stop", scale=0, min_width=90, elem_id="stop")
        viewer: Any = {
            "value": panels.NOTHING,
            "html_template": "<div class='maps'></div>",
            "js_on_load": f"const palette = {panels.palette()}, firstOverlay = {DEFAULT_ALPHA};\n{asset('maps.js')}",
            "apply_default_css": False,
        }
        with gr.Tabs() as self.tabs:
            with gr.Tab("Maps"):
                self.maps = gr.HTML(**viewer)
            with gr.Tab("Stages"):
                self.stages = gr.HTML(**viewer)
            with gr.Tab("Agreement"):
                self.agreement = gr.HTML(**viewer)
            with gr.Tab(CURVES):
                # One above the other, since a legend is cut off at a plot's width; pointing tells what is not there.
                self.insertion, self.deletion = (
                    gr.LinePlot(x="share of the pixels", y="P", color="map", y_lim=[0, 1], title=title, tooltip="all")
                    for title in ("Insertion: more area is better", "Deletion: less area is better")
                )
            with gr.Tab("Python"):
                self.code = gr.Code(language="python", interactive=False, show_label=False)

    def _settings(self) -> None:
        with gr.Row(elem_id="settings"):
            self.overlay = gr.Slider(
                0, 1, DEFAULT_ALPHA, step=0.05, label="Overlay", info="Colour over the photograph", min_width=180
            )
            self.percentile = gr.Slider(
                0, 99, 10, step=1, label="Percentile", info="Dropped from the gradient map", min_width=180
            )
            self.tolerance = gr.Slider(
                0,
                0.2,
                _TOLERANCE,
                step=0.01,
                label="Tolerance",
                info="Of Score-CAM; 0 is exact and slow",
                min_width=180,
            )
            self.weighting = gr.Radio(
                WEIGHTINGS,
                value=WEIGHTINGS[0],
                label="Weighting",
                info="How contributions weigh the maps",
                min_width=340,
            )
        with gr.Row(elem_id="downloads"):
            self.get_picture, self.get_maps, self.get_python = (
                gr.Button(f"Download {what}", size="sm", min_width=120) for what in ("picture", "maps", "Python")
            )
