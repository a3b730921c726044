"""Decodes picture files, of any content, to arrays of pixels."""

import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from taca_jax.data.sources.bad_examples import BadExampleError

FORMATS = ("PNG", "JPEG", "WEBP")
"""What is decoded, by Pillow's names."""

MAX_PIXELS = 100_000_000
"""A picture of more pixels is not decoded: it would take gigabytes."""

_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # orientations whose stored height is the width of the upright picture

# Pillow warns of large pictures; here one that is too large is a bad example like others.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_picture(file: Path | IO[bytes], size: tuple[int, int]) -> np.ndarray:
    """A file's picture, upright, centre-cropped and resized to `size`: uint8 [height, width, 3].

    size: (height, width) in pixels. The crop is the largest of that aspect. Transparency becomes
    white, of an animation the first frame is taken, 16-bit grey is scaled to 8 bits, and CMYK is
    converted without its profile. The format is told by the content, not by the file's name.
    Raises BadExampleError if the picture cannot be read.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            # A JPEG much larger than needed is decoded at a fraction of its size.
            least = 2 * max(size)
            image.draft(None, (least, least))
            if image.width * image.height > MAX_PIXELS:
                raise BadExampleError(
                    f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded"
                )
            return fit_picture(image, size)
    except BadExampleError:
        raise
    except Exception as error:  # Pillow raises almost anything for damaged files
        raise BadExampleError(_reason(error)) from error


def fit_picture(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A picture as `read_picture` returns it: uint8 [height, width, 3]."""
    return _resize(_to_rgb(ImageOps.exif_transpose(image)), *size)


def picture_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """(height, width) in pixels of a file's picture when it is upright, from its header alone.

    Raises BadExampleError if the header cannot be read.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            # Pillow would decode a whole PNG to look for EXIF data behind the pixels.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(_ORIENTATION) in _TURNED
            return (width, height) if turned else (height, width)
    except Exception as error:  # for the same reason
        raise BadExampleError(_reason(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255
        levels = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    # Cropped before it is resized: a very long picture would otherwise be enlarged as a whole.
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.asarray(resized, np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG or WebP picture"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).splitlines()[0]
