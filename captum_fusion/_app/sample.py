"""The picture that is explained where none is given."""

from PIL import Image

from captum_fusion._app.images import Photograph

NAME = "espresso_and_cat"
_SIDE = 448
# The parts of the photographs that are shown.
_COFFEE, _CHELSEA = (90, 20, 530, 240), (0, 40, 451, 265)


def sample_photograph() -> Photograph:
    """Two photographs, a cup of espresso above and a cat below: two objects, of which each method explains either.

    Raises:
        ValueError: If the package that brings them is not there.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The sample photographs need the package {error.name}: pip install 'captum-fusion[demo]', or give one"
        ) from error
    both = Image.new("RGB", (_SIDE, _SIDE))
    for position, (values, part) in enumerate(((data.coffee(), _COFFEE), (data.chelsea(), _CHELSEA))):
        half = Image.fromarray(values).resize((_SIDE, _SIDE // 2), box=part)
        both.paste(half, (0, position * _SIDE // 2))
    return Photograph(both, name=NAME)
