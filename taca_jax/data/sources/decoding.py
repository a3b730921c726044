"""Files of pictures to arrays of pixels, whatever is in them."""

import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from taca_jax.data.sources.bad_examples import BadExampleError

MAX_PIXELS = 100_000_000
"""What is larger once it is decoded is not decoded: it would take gigabytes."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112  # EXIF
_ON_THEIR_SIDE = (5, 6, 7, 8)

# Beyond half of Pillow's own limit it warns; ours is an error of that picture alone.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_picture(file: Path | IO[bytes], size: int | tuple[int, int]) -> np.ndarray:
    """uint8 [height, width, 3]: a file's picture, upright, its middle resized to `size`.

    size: height and width, or the side of a square. As much of the picture as has that aspect is
    kept. Transparency becomes white; of an animation the first frame is taken; 16-bit grey is
    scaled, CMYK converted without its profile. The file's name says nothing: its content does.
    Raises BadExampleError for what cannot be read.
    """
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with Image.open(file, formats=_FORMATS) as image:
            # JPEGs much larger than needed decode at a fraction of their size.
            least = 2 * max(height, width)
            image.draft(None, (least, least))
            if image.width * image.height > MAX_PIXELS:
                raise BadExampleError(
                    f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded"
                )
            upright = ImageOps.exif_transpose(image)
            return _resize(_to_rgb(upright), height, width)
    except BadExampleError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise BadExampleError(_reason(error)) from error


def picture_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """(height, width) in pixels of a file's picture as it stands upright, from its header alone.

    Raises BadExampleError for what cannot be read.
    """
    try:
        with Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            # Of a PNG, Pillow would decode the whole to look for EXIF behind the pixels.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(_ORIENTATION) in _ON_THEIR_SIDE
            return (width, height) if turned else (height, width)
    except Exception as error:  # as above
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
    # The middle is cut first: a very long picture would otherwise be enlarged as a whole.
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
