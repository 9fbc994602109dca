"""Images: find, read, write (PIL).

Reading decodes the whole file at once, so that a damaged one is found here and not in the middle of a batch. Colour
modes are never changed silently: a file that loses nothing by it is unpacked (a palette, a bitmap, an opaque alpha
channel); anything else needs ``convert=True``.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_WORDS = {
    "L": "a grey image",
    "RGB": "a colour image",
    "RGBA": "an image with transparency",
    "LA": "a grey image with transparency",
}


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Image files: files as they are given, folders searched to any depth, in sorted order.

    Args:
        paths: files and folders. A file that is named need not exist nor have a customary suffix: reading it says
            what is wrong.

    Raises:
        ValueError: a folder holds no image, or nothing was given.
        FileNotFoundError: a path without an image's suffix that is not there.
    """
    if not paths:
        raise ValueError("no image given: name files or folders")
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise ValueError(f"folder {str(path)!r} holds no image ({', '.join(SUFFIXES)})")
            found += inside
        elif path.exists() or path.suffix.lower() in SUFFIXES:
            found.append(path)
        else:
            raise FileNotFoundError(f"no such file or folder: {str(path)!r}")
    return found


def read_image(path: str | Path, *, channels: int | None = None, convert: bool = False) -> Image.Image:
    """Reads one image whole, turned upright as its EXIF orientation says.

    Args:
        path: the file.
        channels: 1 (grey), 3 (colour) or 4 (colour and alpha), the mode that is needed; None keeps the file's.
        convert: allow conversions that change what is seen: grey to three equal channels, colour to luminance,
            transparency laid on white.

    Returns:
        A decoded ``PIL.Image`` of mode L, RGB or RGBA when ``channels`` is given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, damaged, no image, or of another mode than ``channels`` asks for.
    """
    path = Path(path)
    if channels is not None and channels not in _MODES:
        raise ValueError(f"images have 1, 3 or 4 channels, {channels} were asked for")
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {str(path)!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{str(path)!r} is empty")
    try:
        with Image.open(path) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise ValueError(f"{str(path)!r} is no image that can be read") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is damaged or truncated ({' '.join(str(error).split())})") from error
    image = _unpack(image)
    return image if channels is None else _to_mode(image, _MODES[channels], convert=convert, name=str(path))


def _unpack(image: Image.Image) -> Image.Image:
    """Undoes encodings that carry no information of their own: palettes, bitmaps, alpha that is opaque everywhere."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert(image.mode[:-1])
    return image


def _to_mode(image: Image.Image, mode: str, *, convert: bool, name: str) -> Image.Image:
    if image.mode == mode:
        return image
    if not convert:
        raise ValueError(
            f"{name!r} is {_WORDS.get(image.mode, f'an image of mode {image.mode}')}, {_WORDS[mode]} is needed; "
            "conversion has to be asked for (convert=True, --convert)"
        )
    if image.mode in ("RGBA", "LA") and mode != "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode.startswith("I;16"):  # PIL clips 16 bits to 8 when it converts; scale them instead
        image = image.point(lambda value: value / 257).convert("L")
    return image.convert(mode)


def writable_suffixes() -> frozenset[str]:
    """The suffixes of the formats that images can be written in."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE)


def write_image(image: Image.Image, path: str | Path) -> Path:
    """Writes an image whole or not at all; the suffix says the format.

    Raises:
        ValueError: PIL knows no format of that suffix.
    """
    path = Path(path)
    formats = Image.registered_extensions()
    if path.suffix.lower() not in formats:
        raise ValueError(f"cannot write {str(path)!r}: no image format has the suffix {path.suffix!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        image.save(draft, format=formats[path.suffix.lower()])
        os.replace(draft, path)
    return path
