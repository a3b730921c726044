"""Makes pictures and tars for tests."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def picture_bytes(value=0, size=(24, 20), format="PNG", **options):
    """A picture of one shade of grey; `size` is (width, height)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(buffer, format, **options)
    return buffer.getvalue()


def noise_bytes(size=(48, 40), format="JPEG", mode="RGB", seed=0, **options):
    """A picture of noise, which compresses badly: its file is not tiny."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode=mode).save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path, files, format=tarfile.PAX_FORMAT):
    """`files`: name -> bytes, text, or what becomes JSON."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            if isinstance(content, str):
                content = content.encode()
            elif not isinstance(content, bytes):
                content = json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
