"""Sample photographs, which ship with the packages that the page needs."""

from typing import NamedTuple

from matplotlib import cbook
from PIL import Image
from skimage import data

from captum_fusion._app.images import Photograph, as_rgb, sample_photograph


class Sample(NamedTuple):
    """A photograph, and the Python that opens it: imports, then an expression, empty for the default."""

    caption: str
    photograph: Photograph
    python: tuple[str, ...]


def samples() -> list[Sample]:
    """The sample photographs."""
    opened = (
        ("a cat", "skimage", "data.chelsea()", data.chelsea()),
        ("a motorcycle", "skimage", "data.stereo_motorcycle()[0]", data.stereo_motorcycle()[0]),
        ("a rocket", "skimage", "data.rocket()", data.rocket()),
    )
    photographs = [
        Sample(
            caption,
            Photograph(Image.fromarray(values), name=f"{package}.{call}"),
            ("from PIL import Image", f"from {package} import data", f"Image.fromarray({call})"),
        )
        for caption, package, call, values in opened
    ]
    portrait = 'cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)'
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        photograph = as_rgb(image)._replace(name="matplotlib's grace_hopper.jpg")
    both = Sample("an espresso and a cat", sample_photograph(), ("",))
    return [both, *photographs, Sample("Grace Hopper", photograph, ("from matplotlib import cbook", portrait))]
