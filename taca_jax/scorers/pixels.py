"""Pictures as the scorers take them: resized, cut to a square, normalised.

As torchvision and OpenAI's CLIP do it on PIL images, with PIL's own bicubic filter, so that the
pixels are equal before they are normalised.
"""

import numpy as np
from jaxtyping import Float
from PIL import Image

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""Of the pixels that CLIP was trained on; BLIP uses the same."""


def clip_pixels(picture: Image.Image, size: int) -> Float[np.ndarray, "h w 3"]:
    """The middle square of a picture whose shorter side is resized to `size`, normalised."""
    picture = picture.convert("RGB")
    shorter = min(picture.size)
    # The longer side is rounded down, as in torchvision.
    width, height = (int(size * side / shorter) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    # Half a pixel is rounded to even, as in torchvision; transformers rounds it down.
    left, top = (round((side - size) / 2) for side in picture.size)
    return _normalised(picture.crop((left, top, left + size, top + size)))


def blip_pixels(picture: Image.Image, size: int) -> Float[np.ndarray, "h w 3"]:
    """The whole picture resized to `size` a side, whatever its aspect, normalised."""
    square = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return _normalised(square)


def _normalised(picture: Image.Image) -> Float[np.ndarray, "h w 3"]:
    return (np.asarray(picture, np.float32) / 255 - MEAN) / STD
