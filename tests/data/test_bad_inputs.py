"""A thousand odd and broken inputs: each is read right, or skipped, counted and named."""

import io
import logging
import struct
import zlib
from collections import Counter
from functools import cache

import numpy as np
import pytest
from PIL import Image

from taca_jax.data.config import DataConfig
from taca_jax.data.loader import make_loader
from taca_jax.data.sources.bad_examples import BadExampleError
from taca_jax.data.sources.decoding import MAX_PIXELS, read_picture
from taca_jax.data.sources.factory import open_source
from taca_jax.data.sources.mixing import summaries
from tests.data.making import noise_bytes, picture_bytes, write_tar

COUNT = 1000


def truncated(i):
    content = noise_bytes(format=("JPEG", "PNG", "WEBP")[i % 3], seed=i)
    return content[: len(content) * (1 + i % 8) // 10]


def cut_in_the_header(i):
    return noise_bytes(seed=i)[: 2 + i % 20]


def flipped(i):
    """A PNG with bytes of its pixels changed, which its checksums show."""
    content = bytearray(noise_bytes(format="PNG", seed=i))
    content[100 + i % 1000] ^= 0xFF
    return bytes(content)


def bomb(i):
    content = bytearray(picture_bytes(size=(8, 8)))
    content[16:24] = struct.pack(">II", 60_000 + i, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def cmyk(i):
    return noise_bytes(mode="CMYK", seed=i)


def deep_grey(i):
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 24), 257 * (i % 256), np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def animated(i):
    frames = [Image.new("RGB", (20, 20), (i % 256,) * 3), Image.new("RGB", (20, 20))]
    buffer = io.BytesIO()
    frames[0].save(buffer, ("PNG", "WEBP")[i % 2], save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def long(i):
    return picture_bytes(i % 256, size=[(1, 5000), (5000, 1)][i % 2])


def not_a_picture(i):
    return [b"", b"<html>404 not found</html>", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(i % 50)][
        i % 4
    ]


def another_format(i):
    return picture_bytes(i % 256, format=("BMP", "TIFF", "GIF")[i % 3])


KINDS = [  # (what makes it, name's end, whether it can be read)
    (lambda i: picture_bytes(i % 256), ".png", True),
    (truncated, ".jpg", False),
    (cut_in_the_header, ".jpg", False),
    (flipped, ".png", False),
    (bomb, ".png", False),
    (cmyk, ".jpg", True),
    (deep_grey, ".png", True),
    (animated, ".webp", True),
    (long, ".png", True),
    (lambda i: picture_bytes(i % 256), ".jpeg", True),  # a PNG by its content
    (not_a_picture, ".jpg", False),
    (another_format, ".png", False),
    (lambda i: noise_bytes(mode="L", seed=i), ".webp", True),  # a JPEG by its content
]
CAPTIONS = [  # (of picture i, whether it can be read)
    (lambda i: f"caption {i}", True),
    (lambda i: f"ein schönes Bild, № {i} 🖼", True),
    (lambda i: b"caf\xe9 in Latin-1", False),
    (lambda i: b" \n\t", False),
    (lambda i: "x" * 5000, True),
    (lambda i: "\ufeffmarked\r\n", True),
]


@cache
def inputs():
    """COUNT of (name, its end, bytes of the picture, bytes of the caption, whether it is good)."""
    return [*made()]


def made():
    for i in range(COUNT):
        make, suffix, readable = KINDS[i % len(KINDS)]
        caption, decodable = CAPTIONS[(i // len(KINDS)) % len(CAPTIONS)]
        text = caption(i)
        yield (
            f"{i:04}",
            suffix,
            make(i),
            text if isinstance(text, bytes) else text.encode(),
            readable and decodable,
        )


def checked(source, names, caplog):
    """The names of the examples that can be read; checks that all others are counted."""
    good = set()
    for i in range(len(source)):
        try:
            example = source.read(i, (16, 24))
        except BadExampleError:
            continue
        assert example["image"].shape == (16, 24, 3)
        assert example["caption"]
        good.add(names(example["id"]))
    assert len(good) + source.bad.count == source.bad.total
    logged = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert all("\n" not in record.message for record in logged)
    assert (
        len([record for record in logged if " bad so far)" in record.message]) <= source.bad.count
    )
    (said,) = summaries(source)
    assert said.startswith(f"skipped {source.bad.count} of {source.bad.total} pictures: ")
    return good


def test_a_thousand_in_a_folder(tmp_path, caplog):
    expected = set()
    for name, suffix, picture, caption, good in inputs():
        (tmp_path / f"{name}{suffix}").write_bytes(picture)
        (tmp_path / f"{name}.txt").write_bytes(caption)
        expected |= {name} if good else set()
    source = open_source(DataConfig(f"folder:{tmp_path}", max_bad_share=1.0))
    assert len(source) == COUNT
    assert checked(source, lambda id: id.partition(".")[0], caplog) == expected
    assert 350 < len(expected) < 450
    # Headers alone are read of what has one.
    sizes = source.sizes()
    assert sizes.shape == (COUNT, 2)
    assert {tuple(size) for size in sizes[8::13]} == {(5000, 1), (1, 5000)}


def test_a_thousand_in_a_torn_tar_through_the_loader(tmp_path, caplog):
    expected, files = set(), {}
    for name, suffix, picture, caption, good in inputs():
        files |= {f"{name}{suffix}": picture, f"{name}.txt": caption}
        expected |= {name} if good else set()
    path = write_tar(tmp_path / "t.tar", files)
    content = bytearray(path.read_bytes())
    # Headers of pictures, found by their names; each costs its sample.
    torn = [name for name in sorted(files) if not name.endswith(".txt")][5:1000:100]
    for name in torn:
        start = content.index(name.encode() + b"\0")
        content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)
    expected -= {name.partition(".")[0] for name in torn}
    source = open_source(DataConfig(f"webdataset:{path}", max_bad_share=1.0, resolution=16))
    assert len(source) == COUNT - len(torn)
    assert checked(source, lambda id: id.rpartition("/")[2], caplog) == expected
    reasons = Counter(record.message.partition("broken tar header")[1] for record in caplog.records)
    assert reasons["broken tar header"] == 1  # one line for all
    data = DataConfig(f"webdataset:{path}", batch_size=25, max_bad_share=1.0, resolution=16)
    with make_loader(source, data=data, tokenize=lambda texts: np.ones((len(texts), 1))) as loader:
        seen = {name for _ in range(40) for name in next(loader)["id"]}
    assert {name.rpartition("/")[2] for name in seen} == expected


@pytest.mark.parametrize("make", [cmyk, deep_grey, animated])
def test_odd_pictures_show_what_they_show(make):
    for i in (2, 101, 200):
        found = read_picture(io.BytesIO(make(i)), (20, 20)).astype(int)
        if make is cmyk:
            assert found.std() > 5
        else:
            assert np.abs(found - i).max() <= 2


# Pillow's own word about it, which pytest lets through.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_would_fill_the_memory_is_not_decoded(tmp_path):
    side = int(MAX_PIXELS**0.5) + 200
    content = bytearray(picture_bytes(size=(8, 8)))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(BadExampleError, match=f"{side} x {side} pixels; at most 100000000 are"):
        read_picture(io.BytesIO(content), (16, 16))
