"""Sources: what folders and shapes give, and what each kind of bad file does."""

import json
import logging
import re
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from taca_jax.data.config import DataConfig
from taca_jax.data.shapes.captions import parse_caption
from taca_jax.data.sources.bad_examples import BadExampleError, BadExamples
from taca_jax.data.sources.decoding import read_picture
from taca_jax.data.sources.factory import GENERATED_SIZE, open_source
from taca_jax.data.sources.folders import FolderSource
from taca_jax.errors import UserError
from tests.shared import shared_path

RED = (200, 30, 40)


def folder(path, resolution=16, max_bad_share=0.5):
    return open_source(
        DataConfig(f"folder:{path}", resolution=resolution, max_bad_share=max_bad_share)
    )


def save(path, color=RED, size=(24, 20), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def captioned(root, *names):
    for name in names:
        save(root / name).with_suffix(".txt").write_text(f"caption of {name}")


def write_table(root, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n")


# Shapes


def test_generated_and_stored_shapes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stored = open_source(DataConfig("tfds:shapes/tiny"))
    drawn = open_source(DataConfig("generated:shapes/64"))
    assert (tmp_path / "taca_jax" / "tfds" / "shapes").is_dir()
    assert len(stored) == len(drawn) == 64
    for i in (0, 17, 63):
        assert stored[i]["image"].shape == (40, 40, 3)
        np.testing.assert_array_equal(stored[i]["image"], drawn[i]["image"])
        assert (stored[i]["caption"], stored[i]["id"]) == (drawn[i]["caption"], drawn[i]["id"])


def test_sizes_of_generated_shapes():
    assert len(open_source(DataConfig("generated:shapes"))) == GENERATED_SIZE
    for size in ("x", "0", "-3", "1e3", "99999999999", "²"):
        with pytest.raises(UserError, match="comes a number of examples, 1 to 16777216"):
            open_source(DataConfig(f"generated:shapes/{size}"))


@pytest.mark.parametrize(
    ("source", "resolution", "message"),
    [
        ("tfds:shapes", 32, "data.resolution is 32, but shapes are drawn at 40 pixels"),
        ("generated:shapes", 64, "data.resolution is 64, but shapes are drawn at 40 pixels"),
        ("tfds:shapes/huge", 40, "'huge' is not one of small, large, tiny"),
        ("generated:circles", 40, "generated:circles; only shapes are generated"),
        ("generated:shapes/9#size", 40, "after # comes one of color, shape, texture"),
        ("tfds:shapes/tiny#color", 40, "only generated:shapes has categories after #"),
    ],
)
def test_shapes_that_are_not_there(source, resolution, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        open_source(DataConfig(source, resolution=resolution))
    assert "\n" not in str(raised.value)


def test_a_category_of_shapes_alone():
    source = open_source(DataConfig(("generated:shapes/20#spatial", "generated:shapes#color")))
    captions = [source[i]["caption"] for i in range(40)]
    related = [parse_caption(caption).relation is not None for caption in captions]
    assert related == [True] * 20 + [False] * 20
    assert len(source) == 20 + GENERATED_SIZE
    assert source[3]["id"] == "train-spatial-0-000003"


# Folders that are right


def test_captions_in_text_files_and_nested_folders(tmp_path):
    captioned(tmp_path, "b.png", "a/c.JPG", "a/d/e.jpeg", "a/f.webp")
    captioned(tmp_path, ".ipynb_checkpoints/x.png", "__MACOSX/y.png", "._b.png")
    (tmp_path / "readme.txt").write_text("not a caption")
    source = folder(tmp_path)
    examples = [source[i] for i in range(len(source))]
    assert [example["id"] for example in examples] == ["a/c.JPG", "a/d/e.jpeg", "a/f.webp", "b.png"]
    assert [example["caption"] for example in examples] == [
        "caption of " + example["id"] for example in examples
    ]
    for example in examples:
        assert example["image"].shape == (16, 16, 3)
        assert example["image"].dtype == np.uint8
        assert np.abs(example["image"].astype(int) - RED).max() < 8
    assert source.bad.count == 0


def test_captions_in_tables(tmp_path):
    for name in ("x/a.png", "x/b.png", "y/c.png", "d.png"):
        save(tmp_path / name)
    write_table(
        tmp_path,
        {"file": "x/a.png", "caption": " an a "},
        "",
        {"file_name": "./x/b.png", "text": "ein ü"},
        {"file": "d.png", "name": "first"},
        {"file": "d.png", "caption": "second", "name": "ignored"},
    )
    write_table(tmp_path / "y", {"file": "c.png", "caption": "in its own folder"})
    (tmp_path / "d.txt").write_text("the table goes first")
    source = folder(tmp_path)
    assert [(source[i]["id"], source[i]["caption"]) for i in range(len(source))] == [
        ("d.png", "first"),
        ("d.png#5", "second"),
        ("x/a.png", "an a"),
        ("x/b.png", "ein ü"),
        ("y/c.png", "in its own folder"),
    ]


def test_a_table_may_have_a_byte_order_mark_and_windows_lines(tmp_path):
    save(tmp_path / "a.png")
    line = json.dumps({"file": "a.png", "caption": "ü"}, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n")
    assert folder(tmp_path)[0]["caption"] == "ü"
    save(tmp_path / "b.png").with_suffix(".txt").write_bytes(b"\xef\xbb\xbfmarked\r\n")
    assert folder(tmp_path)[1]["caption"] == "marked"


# Pictures of every kind


def quadrants(width=40, height=40):
    """Red, green / blue, white."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (255, 0, 0)
    image[: height // 2, width // 2 :] = (0, 255, 0)
    image[height // 2 :, : width // 2] = (0, 0, 255)
    image[height // 2 :, width // 2 :] = 255
    return Image.fromarray(image)


def corners(image):
    last = image.shape[0] - 2
    return [tuple(int(v > 127) for v in image[y, x]) for y in (1, last) for x in (1, last)]


UPRIGHT = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_pictures_stand_upright(tmp_path, orientation, suffix):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = quadrants()
    if orientation in undo:
        image = image.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    assert corners(read_picture(tmp_path / f"a.{suffix}", (16, 16))) == UPRIGHT


@pytest.mark.parametrize("size", [(80, 40), (40, 80), (41, 40), (40, 41)])
def test_the_central_square_is_kept(tmp_path, size):
    image = Image.new("RGB", size, (255, 0, 255))
    image.paste(quadrants(), ((size[0] - 40) // 2, (size[1] - 40) // 2))
    image.save(tmp_path / "a.png")
    resized = read_picture(tmp_path / "a.png", (20, 20))
    assert corners(resized) == UPRIGHT
    assert resized.flags.c_contiguous


def test_a_picture_of_the_right_size_is_not_changed(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", (32, 32)), pixels)


def test_shrinking_averages_and_does_not_pick(tmp_path):
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[::2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.abs(read_picture(tmp_path / "a.png", (16, 16)).astype(int) - 127).max() < 20


def test_large_jpegs_decoded_small_look_the_same(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((600, 700), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.jpg", quality=95)
    exact, drafted = (
        read_picture(tmp_path / name, (32, 32)).astype(int) for name in ("a.png", "a.jpg")
    )
    assert np.abs(exact - drafted).mean() < 2


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (3, 2)])
def test_tiny_and_long_pictures(tmp_path, size):
    assert (read_picture(save(tmp_path / "a.png", size=size), (16, 16)) == RED).all()


def gray16(path):
    Image.fromarray(np.full((20, 20), 32896, np.uint16)).save(path)


def palette(path):
    Image.new("RGB", (20, 20), (128,) * 3).quantize(4).save(path)


def palette_transparent(path):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(path, transparency=1)


def animated(path):
    frames = [Image.new("RGB", (20, 20), (v,) * 3) for v in (128, 0, 255)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def phone(path):
    frames = [Image.new("RGB", (20, 20), (v,) * 3) for v in (128, 0)]
    frames[0].save(path, "MPO", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("a.png", gray16, 128),
        ("a.png", palette, 128),
        ("a.png", palette_transparent, 255),
        ("a.png", animated, 128),
        ("a.webp", animated, 128),
        ("a.jpg", phone, 128),
        ("a.jpg", lambda p: save(p, (0, 0, 0, 127), mode="CMYK"), 128),
        ("a.jpg", lambda p: save(p, 128, mode="L"), 128),
        ("a.png", lambda p: save(p, 1, mode="1"), 255),
        ("a.png", lambda p: save(p, (0, 0, 0, 0), mode="RGBA"), 255),
        ("a.png", lambda p: save(p, (0, 0, 0, 127), mode="RGBA"), 128),
        ("a.webp", lambda p: save(p, (0, 0, 0, 0), mode="RGBA"), 255),
        ("a.png", lambda p: save(p, (0, 127), mode="LA"), 128),
        ("a.png", lambda p: save(p, (9, 9, 9), transparency=(9, 9, 9)), 255),
        ("a.jpg", lambda p: save(p, (128,) * 3), 128),
    ],
)
def test_modes(tmp_path, name, make, expected):
    make(tmp_path / name)
    image = read_picture(tmp_path / name, (16, 16))
    assert image.shape == (16, 16, 3)
    assert np.abs(image.astype(int) - expected).max() <= 2


# Bad files


def truncated(path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def bomb(path):
    save(path, size=(8, 8))
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("bad.png", truncated, "runcated"),
        ("bad.jpg", truncated, "truncated"),
        ("bad.webp", truncated, ""),
        ("bad.png", bomb, "decompression bomb"),
        ("bad.png", lambda p: p.write_bytes(b""), "not a PNG, JPEG or WebP picture"),
        ("bad.png", lambda p: p.write_bytes(b"<html>404"), "not a PNG, JPEG or WebP picture"),
        ("bad.jpg", lambda p: Image.new("RGB", (9, 9)).save(p, "BMP"), "not a PNG, JPEG or WebP"),
        ("bad.png", lambda p: p.symlink_to("nowhere.png"), "No such file or directory"),
    ],
)
def test_bad_pictures_are_counted_and_named_once(tmp_path, caplog, name, make, reason):
    captioned(tmp_path, "good.png", "other.png")
    (tmp_path / "bad.txt").write_text("a caption")
    make(tmp_path / name)
    source = folder(tmp_path)
    assert len(source) == 3
    for _ in range(3):
        with pytest.raises(BadExampleError):
            source[0]
    assert source[1]["caption"] == "caption of good.png"
    assert source.bad.count == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"skipped {tmp_path / name}: " in record.message
    assert reason in record.message
    assert "\n" not in record.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe\x00", "bad.txt is not UTF-8"), (b" \n", "bad.txt is empty")],
)
def test_bad_text_files(tmp_path, caplog, content, reason):
    captioned(tmp_path, "bad.png", "good.png", "other.png")
    (tmp_path / "bad.txt").write_bytes(content)
    source = folder(tmp_path)
    with pytest.raises(BadExampleError, match=reason):
        source[0]
    assert source.bad.count == 1
    assert [reason in record.message for record in caplog.records] == [True]


def test_a_picture_removed_later_is_bad(tmp_path):
    captioned(tmp_path, "a.png", "b.png", "c.png")
    source = folder(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadExampleError, match="No such file"):
        source[0]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match="2 of 3 pictures cannot be used"):
        source[1]


def test_what_a_folder_lacks_is_said_when_it_is_opened(tmp_path, caplog):
    captioned(tmp_path, *(f"good{i}.png" for i in range(10)))
    for i in range(4):
        save(tmp_path / f"silent{i}.png")
    save(tmp_path / "blank.png")
    (tmp_path.parent / "outside.png").write_bytes((tmp_path / "blank.png").read_bytes())
    lines = [
        '{"file": "gone1.png", "caption": "x"}',
        '{"file": "../outside.png", "caption": "x"}',
        '{"file": "blank.png", "caption": " "}',
        "{",
        "[1]",
        '{"file": "a.png"}',
        '{"file": 3, "caption": "x"}',
    ]
    table = "\n".join(lines).encode() + b'\n{"file": "good1.png", "caption": "\xff"}\n'
    (tmp_path / "captions.jsonl").write_bytes(table)
    source = folder(tmp_path, max_bad_share=0.6)
    assert len(source) == 10
    assert source.bad.count == 12
    missing, empty, malformed, silent = sorted(
        (record.message for record in caplog.records),
        key=lambda m: [w in m for w in ("there (as", "empty caption", "JSON", "without")].index(1),
    )
    assert "skipped 2: named in captions.jsonl but not there" in missing
    assert "gone1.png, ../outside.png" in missing
    assert "skipped 1: with an empty caption: blank.png" in empty
    assert "skipped 5: not a line of UTF-8 JSON" in malformed
    assert "captions.jsonl:4, captions.jsonl:5, captions.jsonl:6, ..." in malformed
    assert "skipped 4: without a caption" in silent
    assert "silent0.png, silent1.png, silent2.png, ..." in silent
    with pytest.raises(UserError, match="12 of 22 pictures cannot be used"):
        folder(tmp_path, max_bad_share=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "holds no pictures (.png, .jpg, .jpeg, .webp)"),
        (lambda root: (root / "a.txt").write_text("x"), "holds no pictures"),
        (lambda root: (root / "captions.jsonl").touch(), "holds no pictures"),
        (lambda root: root.rmdir(), "does not exist; data.source=folder:PATH takes a folder"),
        (lambda root: (root.rmdir(), root.touch()), "is not a folder"),
        (lambda root: save(root / "a.png"), "1 of 1 pictures cannot be used"),
        (lambda root: write_table(root, {"file": "a.png", "caption": "x"}), "but not there"),
        (
            lambda root: (root / "captions.jsonl").write_text('{"file": 1}', "utf-16"),
            "not a line of UTF-8 JSON",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, message):
    root = tmp_path / "pictures"
    root.mkdir()
    make(root)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        folder(root, max_bad_share=1.0)
    assert "\n" not in str(raised.value)
    assert str(root) in str(raised.value)


# When bad ones are too many


def run_through(bad_indices, total, share):
    """How many examples were read before it stopped; None if it never did."""
    bad = BadExamples(total, share)
    for i in range(total):
        try:
            if i in bad_indices:
                bad.add_bad(i, f"{i}.png", "torn")
            else:
                bad.add_good(i)
        except UserError:
            return i + 1
    return None


def test_more_than_the_share_stops_and_no_more_than_it_never_does():
    assert run_through({0, 1, 2, 3, 4}, 100, 0.05) is None
    assert run_through({0, 1, 2, 3, 4, 99}, 100, 0.05) == 100
    assert run_through({7}, 100, 0.0) == 8
    assert run_through(set(range(99)), 100, 1.0) is None
    assert run_through(set(range(100)), 100, 1.0) == 100


def test_a_folder_that_is_mostly_bad_stops_early():
    assert run_through(set(range(100_000)), 100_000, 0.05) == 50
    assert run_through(set(range(0, 100_000, 4)), 100_000, 0.05) < 200


def test_chance_does_not_stop_a_folder_below_the_share():
    stops = 0
    for seed in range(40):
        bad = np.random.default_rng(seed).permutation(10_000)[:400]
        stops += run_through(set(bad.tolist()), 10_000, 0.05) is not None
    assert stops == 0


def test_an_example_counts_once_however_often_it_is_read(caplog):
    bad = BadExamples(10, 0.2)
    for _ in range(100):
        bad.add_bad(3, "3.png", "torn")
        bad.add_good(4)
    assert bad.count == 1
    assert len(caplog.records) == 1
    bad.add_bad(5, "5.png", "torn")
    with pytest.raises(UserError) as raised:
        bad.add_bad(6, "6.png", "torn")
    assert str(raised.value) == (
        "3 of 10 pictures cannot be used, more than data.max_bad_share=0.2 allows (such as 6.png: "
        "torn): repair or remove them, or raise data.max_bad_share"
    )


# Real pictures


def unpack(name, to):
    with zipfile.ZipFile(shared_path(f"assets/{name}")) as archive:
        archive.extractall(to)


def test_dreambooth(tmp_path):
    unpack("dreambooth_512.zip", tmp_path)
    source = folder(tmp_path, resolution=64, max_bad_share=0.0)
    assert isinstance(source, FolderSource)
    assert len(source) == 158
    assert source[0]["id"] == "dataset/backpack/00.jpg"
    assert source[0]["caption"] == "a photo of a backpack"
    images = np.stack([source[i]["image"] for i in range(0, 158, 10)])
    assert images.shape == (16, 64, 64, 3)
    assert images.std(axis=(1, 2, 3)).min() > 20


def test_emoji_with_transparent_grounds(tmp_path):
    unpack("fluent_emoji_3d_256.zip", tmp_path)
    source = folder(tmp_path, resolution=32, max_bad_share=0.0)
    assert len(source) == 1599
    assert source[0]["caption"] == "hash key"
    images = np.stack([source[i]["image"] for i in range(0, 1599, 100)])
    assert (images[:, 0, 0] == 255).mean() > 0.8
