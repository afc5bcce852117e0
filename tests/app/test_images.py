"""Pictures of all types become the 8 bits that they show."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from captum_fusion._app.images import ImageError, as_rgb, find_images, open_photograph
from captum_fusion._app.models.preprocessing import Preprocessing

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("name", "values", "note"),
    [
        ("16.png", (RAMP * 65535).round().astype(np.uint16), "16-bit values are scaled from [0, 65535]"),
        ("16.tif", (RAMP * 65535).round().astype(np.uint16), "16-bit values are scaled from [0, 65535]"),
        ("16.pgm", (RAMP * 65535).round().astype(np.uint16), "16-bit values are scaled from [0, 65535]"),
        ("32.tif", (RAMP * (2**31 - 1)).round().astype(np.int32), "32-bit values are scaled from [0, 2.14748e+09]"),
        ("float.tif", RAMP.astype(np.float32), "floating-point values are scaled from [0, 1]"),
    ],
)
def test_values_are_scaled_by_the_range_of_their_type(name: str, values: np.ndarray, note: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / name)
    photograph = open_photograph(tmp_path / name)
    assert photograph.note == note
    # Half of them would have been clipped to white.
    np.testing.assert_array_equal(np.asarray(photograph.image)[..., 0], np.arange(256).reshape(16, 16))
    seen = Preprocessing(16, 16, (0.0,) * 3, (1.0,) * 3).crop(Image.open(tmp_path / name))
    np.testing.assert_allclose(seen[0, 1].numpy(), RAMP, atol=1e-6)


def test_a_tiff_whose_zero_is_white(tmp_path: Path) -> None:
    for values in (np.array([[0, 65535]], dtype=np.uint16), np.array([[0, 1]], dtype=np.float32)):
        for photometry, expected in ((0, [255, 0]), (1, [0, 255])):
            Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: photometry})
            assert np.asarray(open_photograph(tmp_path / "a.tif").image)[0, :, 0].tolist() == expected


def test_floating_point_values_outside_0_to_1_are_refused(tmp_path: Path) -> None:
    for values, message in ((RAMP * 255, "from 0 to 255"), (RAMP - 0.5, "from -0.5 to 0.5"), (RAMP * np.nan, "nan")):
        Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
        with pytest.raises(ValueError, match=rf"float.tif cannot be read: its floating-point values reach .*{message}"):
            open_photograph(tmp_path / "float.tif")


def test_transparent_parts_are_shown_on_white() -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (0, 0, 0, 51)
    photograph = as_rgb(Image.fromarray(pixels))
    assert photograph.note == "transparent parts are shown on white"
    # A fifth of black over white leaves four fifths of white.
    np.testing.assert_array_equal(
        np.asarray(photograph.image), [[[10, 20, 30], [204, 204, 204]], [[255, 255, 255], [255, 255, 255]]]
    )
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.info["transparency"] = 1
    assert as_rgb(palette).image.getpixel((0, 0)) == (255, 255, 255)
    pixels[..., 3] = 255
    assert as_rgb(Image.fromarray(pixels)).note == ""


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_pictures_are_upright_once(kind: str, tmp_path: Path) -> None:
    image = Image.fromarray((RAMP * 255).astype(np.uint8)).resize((30, 20)).convert("RGB")
    for orientation in range(10):
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"turned.{kind}", exif=exif)
        with Image.open(tmp_path / f"turned.{kind}") as turned:
            expected = np.asarray(ImageOps.exif_transpose(turned))
        photograph = open_photograph(tmp_path / f"turned.{kind}")
        np.testing.assert_array_equal(np.asarray(photograph.image), expected, err_msg=str(orientation))
        np.testing.assert_array_equal(np.asarray(as_rgb(photograph.image).image), expected, err_msg=str(orientation))


def test_a_broken_exif_block_does_not_cost_the_picture(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "teal").save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*broken")
    Image.new("RGB", (8, 6), "teal").save(tmp_path / "b.png", exif=b"neither TIFF nor EXIF")
    for name in ("a.jpg", "b.png"):
        photograph = open_photograph(tmp_path / name)
        assert photograph.image.size == (8, 6)
    assert photograph.note == "its EXIF block is broken and ignored"


@pytest.mark.parametrize("kind", ["gif", "tif", "webp", "png"])
def test_of_several_frames_the_first_is_used_and_the_others_are_mentioned(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("white", "black", "teal")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:])
    photograph = open_photograph(tmp_path / f"a.{kind}")
    assert photograph.note == "only frame 1 of several is used"
    assert photograph.image.getpixel((0, 0)) == (255, 255, 255)


def test_a_heif_picture_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.heic", format="PNG")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"a.heic cannot be read: .* pip install '.\[heif\]'"):
        open_photograph(tmp_path / "a.heic")
    registered: list[bool] = []
    plugin = SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert open_photograph(tmp_path / "a.heic").image.size == (8, 6)
    assert registered


def test_the_pictures_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "c.png").mkdir()
    assert [file.name for file in find_images(tmp_path)] == ["a.png", "b.JPG"]
    with pytest.raises(ValueError, match=r"c.png is a folder without images"):
        find_images(tmp_path / "c.png")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ValueError, match=r"bomb.png cannot be read: .*decompression bomb"):
        open_photograph(tmp_path / "bomb.png")


def test_broken_files(tmp_path: Path) -> None:
    Image.effect_noise((60, 50), 50).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half.png cannot be read: "):
        open_photograph(tmp_path / "half.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text.png cannot be read: it is not an image in a supported format"):
        open_photograph(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        open_photograph(tmp_path / "missing.png")


def test_strangers_pictures_are_limited_and_named_without_their_folder(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif", "a.ppm"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
        assert open_photograph(tmp_path / name, untrusted=True).name == name
    # Pillow runs another program for this kind.
    Image.new("RGB", (4, 3)).save(tmp_path / "a.eps")
    Image.new("1", (9000, 6000)).save(tmp_path / "large.png")
    for name, message in (
        ("a.eps", "not an image in a supported format"),
        ("large.png", "9000 x 6000 pixels; .* 50 million"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} cannot be read: .*{message}"):
            open_photograph(tmp_path / name, untrusted=True)
