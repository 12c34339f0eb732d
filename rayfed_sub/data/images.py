"""Images as their files hold them, and as rows of pixels.

Legend: B rows of a batch, c channels (1 gray, 3 RGB), s pixels of a square's side.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayfed_sub.data.rows import Ints

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Images:
    """Rows of square images with a label each.

    pixels uint8 (rows, channels, side, side), one channel where all images are gray, else 3; classes: as of `Rows`;
    mean, std float32 (3,): of the model's inputs, for values from 0 to 1.
    """

    pixels: Pixels
    classes: NDArray[Any]
    mean: Floats
    std: Floats

    @classmethod
    def of(
        cls,
        pixels: Sequence[Pixels],
        classes: Sequence[int] | NDArray[Any],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Images:
        """Rows from lists, one entry a row, uint8 (1 or 3, side, side): all gray, or all RGB.

        >>> gray, red = np.full((1, 1, 1), 51, np.uint8), np.uint8([255, 0, 0]).reshape(3, 1, 1)
        >>> Images.of([gray, red], [0, 1], [0.5] * 3, [0.5] * 3).pixels.reshape(2, 3).tolist()
        [[51, 51, 51], [255, 0, 0]]
        """
        channels = max((len(one) for one in pixels), default=1)
        stacked = np.stack([np.broadcast_to(one, (channels, *one.shape[1:])) for one in pixels])
        own = classes if isinstance(classes, np.ndarray) else np.asarray(classes, np.int64)
        return cls(stacked, own, np.asarray(mean, np.float32), np.asarray(std, np.float32))

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All arrays that grow with the rows."""
        return self.pixels, self.classes

    def take(self, indices: Ints) -> Images:
        """The rows at `indices`, in that order, as new arrays."""
        return Images(self.pixels[indices], self.classes[indices], self.mean, self.std)

    def inputs(self, indices: Ints) -> Floats:
        """Model inputs of the rows at `indices`: (pixels / 255 - mean) / std, (B, 3, s, s), gray three times.

        >>> gray = np.full((1, 1, 1, 1), 51, np.uint8)
        >>> images = Images(gray, np.zeros(1, np.int64), np.float32([0.0, 0.2, 0.4]), np.float32([1.0, 1.0, 0.5]))
        >>> images.inputs(np.array([0])).ravel().astype(float).round(3).tolist()
        [0.2, 0.0, -0.4]
        """
        values_Bcss = self.pixels[indices].astype(np.float32) / np.float32(255)
        inputs_B3ss: Floats = (values_Bcss - self.mean[:, None, None]) / self.std[:, None, None]
        return inputs_B3ss


_MODES = {**dict.fromkeys(("CMYK", "YCbCr", "LAB", "HSV", "RGBX"), "RGB"), "PA": "RGBA", "RGBa": "RGBA"}
"""Modes of Pillow's that PNG lacks, and those that hold the same picture."""


def encoded(cell: Any) -> bytes:
    """The bytes of an image's file, from a table's cell: bytes, {"bytes", "path"} as `datasets` has it, or (as PNG) a
    PIL image or an array of one, uint8 (height, width) or (height, width, 1, 3 or 4).  b"" for an empty cell.
    Raises OSError for a path that cannot be read, ValueError for anything else, and for {"error"}, which says why."""
    if isinstance(cell, Mapping):
        if error := cell.get("error"):
            raise ValueError(error)
        content, path = cell.get("bytes"), cell.get("path")
        return Path(path).read_bytes() if not content and path else content or b""
    if isinstance(cell, np.ndarray):
        from PIL import Image

        if cell.dtype != np.uint8:
            raise ValueError(f"an array of {cell.dtype}, not of uint8")
        if not (cell.ndim == 2 or (cell.ndim == 3 and cell.shape[2] in (1, 3, 4))):
            raise ValueError(f"an array of the shape {cell.shape}, not (height, width) or (height, width, 3)")
        return as_png(Image.fromarray(cell[:, :, 0] if cell.shape[2:] == (1,) else cell))
    if hasattr(cell, "save"):
        return _saved(cell)
    if isinstance(cell, str):
        raise ValueError(f"{cell!r} is text, not an image's bytes")
    if not isinstance(cell, bytes | None):
        raise ValueError(f"a {type(cell).__name__}, not an image: give its file's bytes, a PIL image or a numpy array")
    return cell or b""


def _saved(image: Any) -> bytes:
    """A PIL image as PNG: upright, since a PNG would lose its EXIF tag, and in a mode that PNG has."""
    from PIL import ImageOps

    try:
        upright = ImageOps.exif_transpose(image)
        return as_png(upright.convert(_MODES[upright.mode]) if upright.mode in _MODES else upright)
    except Exception as error:  # a file that is read only now makes Pillow and its codecs raise nearly anything
        raise ValueError(_cause(error)) from error


def _cause(error: Exception) -> str:
    return str(error).replace("\n", " ") or type(error).__name__


@dataclass(frozen=True)
class Opened:
    """An image as the eye sees it.  image: a PIL image, upright, in mode L where all its pixels are gray, else RGB;
    transparent: whether white shows through it; largest: of 16-bit pixels, the largest value."""

    image: Any
    transparent: bool = False
    largest: int | None = None


def opened(content: bytes, white: int = 65535) -> Opened:
    """The image of an encoded file, over white where it is transparent.  white: the value of 16-bit pixels that is
    white; what is brighter is white too.

    Raises ValueError, with a short reason, for a file that Pillow cannot read.
    """
    from PIL import Image, ImageOps

    if not content:
        raise ValueError("empty")
    try:
        with Image.open(io.BytesIO(content)) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # Pillow would cut off what is brighter than 255
                values = np.asarray(image).astype(np.int64)
                scaled = np.minimum((values * 255 + white // 2) // white, 255)
                return Opened(Image.fromarray(scaled.astype(np.uint8)), largest=int(values.max(initial=0)))
            if image.mode in ("I", "F"):
                raise ValueError(f"32-bit pixels (mode {image.mode}), whose black and white nobody says")
            transparent = False
            if image.has_transparency_data:
                image = image.convert("RGBA")
                transparent = bool((np.asarray(image.getchannel("A")) < 255).any())
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:  # a broken file makes Pillow and its codecs raise nearly anything
        raise ValueError(_cause(error)) from error
    if image.mode == "RGB":
        red, green, blue = image.split()
        image = red if red.tobytes() == green.tobytes() == blue.tobytes() else image
    return Opened(image, transparent)


def decoded(content: bytes) -> Any:
    """The image of `opened`, as a PIL image."""
    return opened(content).image


def as_png(image: Any) -> bytes:
    """A PIL image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def digest(image: Any) -> str:
    """The SHA-256 of a decoded image's size and pixels, in hex: the same for every file that holds just these.

    >>> from PIL import Image
    >>> digest(Image.new("L", (2, 3))) == digest(Image.new("L", (3, 2)))
    False
    """
    return hashlib.sha256(f"{image.width}x{image.height} {image.mode} ".encode() + image.tobytes()).hexdigest()
