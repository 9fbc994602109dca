"""Reading images: every bad file gives one line that names it, and colour modes change only when asked."""

import io

import numpy as np
import pytest
from PIL import Image

from sparing.media.image import find_images, read_image, write_image


def picture(mode: str, size=(8, 6)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def save(path, image, **options):
    image.save(path, **options)
    return path


def test_folders_are_searched_and_named_files_are_taken_as_they_are(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.JPG", "deep/c.webp", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in find_images([tmp_path])] == ["a.JPG", "b.png", "c.webp"]
    assert find_images([tmp_path / "notes.txt", tmp_path / "gone.png"]) == [
        tmp_path / "notes.txt",
        tmp_path / "gone.png",
    ]


def test_nothing_to_read_is_said_plainly(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no image"):
        find_images([tmp_path])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_images([tmp_path / "gone"])
    with pytest.raises(ValueError, match="no image given"):
        find_images([])


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    picture("RGB", (64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.jpg' is empty"),
        (b"not a picture", "x.jpg' is no image that can be read"),
        (truncated_jpeg(), "x.jpg' is damaged or truncated"),
    ],
)
def test_bad_files_give_one_line(tmp_path, content, message):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_image(tmp_path / "x.jpg")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such image: .*x.png"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("mode", "channels", "words"),
    [
        ("L", 3, "a grey image, a colour image is needed"),
        ("RGB", 1, "a colour image, a grey image is needed"),
        ("RGBA", 3, "an image with transparency, a colour image is needed"),
    ],
)
def test_a_colour_mode_changes_only_when_asked(tmp_path, mode, channels, words):
    path = save(tmp_path / "x.png", picture(mode))
    with pytest.raises(ValueError, match=words):
        read_image(path, channels=channels)
    assert len(read_image(path, channels=channels, convert=True).getbands()) == channels


def test_grey_becomes_three_equal_channels_and_transparency_white(tmp_path):
    grey = save(tmp_path / "g.png", picture("L"))
    colour = np.asarray(read_image(grey, channels=3, convert=True))
    assert (colour == np.asarray(picture("L"))[..., None]).all()
    clear = save(tmp_path / "c.png", Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    assert (np.asarray(read_image(clear, channels=3, convert=True)) == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    path = save(tmp_path / "x.png", Image.fromarray(values))
    with pytest.raises(ValueError, match="mode I;16"):
        read_image(path, channels=1)
    assert np.asarray(read_image(path, channels=1, convert=True)).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("mode", ["P", "1", "RGBA"])
def test_encodings_that_lose_nothing_are_unpacked(tmp_path, mode):
    image = picture("RGB").convert(mode)
    path = save(tmp_path / "x.png", image)
    expected = image.convert("L" if mode == "1" else "RGB")
    assert np.array_equal(np.asarray(read_image(path, channels=1 if mode == "1" else 3)), np.asarray(expected))


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "x.jpg", picture("RGB", (8, 6)), exif=exif)
    assert read_image(path).size == (6, 8)


def test_channels_are_checked(tmp_path):
    with pytest.raises(ValueError, match="1, 3 or 4 channels, 2 were asked for"):
        read_image(tmp_path / "x.png", channels=2)


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = write_image(picture("RGB"), tmp_path / "new" / "x.png")
    assert np.array_equal(np.asarray(read_image(path)), np.asarray(picture("RGB")))
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match=r"no image format has the suffix '.xyz'"):
        write_image(picture("RGB"), tmp_path / "x.xyz")
    with pytest.raises(OSError, match="RGBA"):
        write_image(picture("RGBA"), tmp_path / "new" / "y.jpg")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]
