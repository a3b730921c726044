"""prompts=FILE: what a list may say, the names and metadata of its pictures, and going on."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.pipelines import generate as generation
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.generate import generate
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import TacaConfig
from tests.processes import run_cluster

LOADING = "taca_jax.pipelines.pipeline.Pipeline.from_pretrained"
PROMPTS = ["a red circle", "", "a blue square", "a green circle above a blue square", " "]
JSON_LINES = [
    {"prompt": "a red circle", "seed": 5},
    {"prompt": "a blue square", "height": 48, "guidance": 1.0},
    {"prompt": "a red circle", "negative_prompt": "a blue square", "width": 48},
]


def config(out: Path, file: Path, **changes) -> GenerateConfig:
    values = {
        "base": "shapes_base",
        "prompts": str(file),
        "taca": TacaConfig(gamma=1.5, threshold=835),
        "guidance": 2.0,
        "steps": 1,
        "dtype": "float32",
        "batch_size": 2,
        "out": str(out),
    }
    return GenerateConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("lists") / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory, file) -> Path:
    """All pictures of the list, drawn without a stop."""
    out = tmp_path_factory.mktemp("drawn") / "whole"
    generate(config(out, file))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def settings(path: Path) -> dict:
    with Image.open(path) as picture:
        return json.loads(picture.text["taca_jax"])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_names_are_of_lines_and_metadata_of_each_picture(whole, tmp_path):
    names = [f"{line:05d}-000.png" for line in (1, 3, 4)]
    assert sorted(contents(whole)) == names
    said = settings(whole / names[1])
    assert (said["prompt"], said["seed"], said["guidance"]) == (PROMPTS[2], 0, 2.0)
    assert (said["height"], said["width"], said["steps"]) == (40, 40, 1)
    alone = config(tmp_path / "x.png", Path(), prompts=None, prompt=PROMPTS[2])
    [single] = generate(alone)
    assert abs(pixels(single) - pixels(whole / names[1])).max() <= 1
    assert settings(single) == said


def test_what_is_missing_is_drawn_again_to_the_byte(tmp_path, file, whole, monkeypatch, capsys):
    """Stopped at its second picture; then one of a batch is removed; then all is there."""

    class StoppedHere(BaseException):
        pass

    def failing(path, *rest, **options):
        if len(contents(tmp_path)) == 1:
            raise StoppedHere
        write(path, *rest, **options)

    write = generation.write_picture
    monkeypatch.setattr(generation, "write_picture", failing)
    with pytest.raises(StoppedHere):
        generate(config(tmp_path, file))
    monkeypatch.setattr(generation, "write_picture", write)
    (kept,) = tmp_path.glob("*.png")
    time = kept.stat().st_mtime_ns
    assert len(generate(config(tmp_path, file, progress=False))) == 3
    said = capsys.readouterr().out
    assert "3 prompts; 2 of 3 pictures to draw" in said
    assert "00003-000.png (40 x 40 px, enlarged 13 times), 1 of 2\n" in said
    assert kept.stat().st_mtime_ns == time
    assert contents(tmp_path) == contents(whole)
    (tmp_path / "00003-000.png").unlink()
    generate(config(tmp_path, file))
    assert contents(tmp_path) == contents(whole)
    monkeypatch.setattr(LOADING, lambda *_, **__: pytest.fail("loaded"))
    generate(config(tmp_path, file))
    assert "all 3 pictures are there" in capsys.readouterr().out


def test_what_was_drawn_otherwise_is_refused_before_anything_loads(file, whole, monkeypatch):
    monkeypatch.setattr(LOADING, lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"00001-000.png is there, and .* seed is 0 there, 1 here"):
        generate(config(whole, file, seed=1))
    with pytest.raises(UserError, match=r"taca is \{.* there, null here; remove it, or name ano"):
        generate(config(whole, file, taca=None))


def test_json_lines_have_settings_of_their_own(tmp_path, monkeypatch):
    file = tmp_path / "list.jsonl"
    file.write_text("\n".join(map(json.dumps, JSON_LINES)))
    sizes, call = [], Pipeline.__call__

    def counted(self, *arguments, **options):
        sizes.append(len(options["prompt_embeds"]))
        return call(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "__call__", counted)
    paths = generate(
        config(tmp_path / "x.png", file, num_images=2, batch_size=3, stages=True, preview="own")
    )
    shown = pixels(tmp_path / "x-preview.png")
    np.testing.assert_array_equal(shown, np.hstack([pixels(path) for path in paths[4:]]))
    names = [f"x-{line:05d}-{i:03d}.png" for line in (1, 2, 3) for i in (0, 1)]
    assert [path.name for path in paths] == names
    assert sizes == [2, 2, 2]  # no two lines are alike in size and guidance
    said = [settings(path) for path in paths]
    assert [each["seed"] for each in said] == [5, 6, 0, 1, 0, 1]
    assert [each["guidance"] for each in said] == [2.0, 2.0, 1.0, 1.0, 2.0, 2.0]
    assert pixels(paths[2]).shape[:2] == (48 * 11, 40 * 11)
    assert pixels(paths[4]).shape[:2] == (40 * 11, 48 * 11)
    alone = {"prompts": None, "batch_size": 1, "seed": 1, **JSON_LINES[2]}
    [single] = generate(config(tmp_path / "alone.png", file, **alone))
    assert abs(pixels(single) - pixels(paths[5])).max() <= 1


def test_a_comparison_has_a_row_for_each_picture(tmp_path, file):
    paths = generate(config(tmp_path / "rows", file, compare=True, batch_size=3))
    assert [path.name for path in paths] == [f"{line:05d}-000.png" for line in (1, 3, 4)]
    for path in paths:
        assert pixels(path).shape[1] > 2 * 520
        assert settings(path)["compare"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a", "sed": 1}', "line 2: unknown key sed; did"),
        ("a.jsonl", '{"seed": 1}', "line 1: prompt is empty; say what to draw"),
        ("a.jsonl", '{"prompt": ""}', "line 1: prompt is empty"),
        ("a.jsonl", '{"prompt": "a", "seed": "1"}', 'line 1: seed="1": expected an integer'),
        ("a.jsonl", '{"prompt": "a", "seed": null}', "line 1: seed=null: expected an integer"),
        ("a.jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed is -1; it must be 0 to"),
        ("a.jsonl", '{"prompt": "a", "height": 2}', "line 1: height is 2; it must be 8 or more"),
        ("a.jsonl", '\n{"prompt": "a red circle", "width": 41}', "line 2: 40 x 41 pixels: both"),
        ("a.jsonl", '{"prompt": "a", "guidance": -1}', "line 1: guidance is -1.0; it must be"),
        (
            "a.jsonl",
            '{"prompt": "a red circle", "guidance": 1, "negative_prompt": "a blue square"}',
            "line 1: a negative prompt acts with guidance above 1; it is 1",
        ),
        ("a.jsonl", "a red circle", "line 1 is not JSON"),
        ("a.jsonl", '["a red circle"]', "line 1 is no JSON object"),
        ("a.txt", '{"prompt": "a red circle"}', "line 1 is JSON; name the file .jsonl"),
        ("a.txt", "a red circle\n\na red dragon", "line 3: .*dragon"),
        ("a.txt", " \n\n", "a.txt has no prompt; write one in each line"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
    ],
)
def test_a_line_that_cannot_be_drawn_is_named_before_anything_loads(
    tmp_path, monkeypatch, name, text, message
):
    monkeypatch.setattr(LOADING, lambda *_, **__: pytest.fail("loaded"))
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        generate(config(tmp_path / "out", file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_list_and_a_prompt_beside_it_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.txt cannot be read \(No such file"):
        generate(config(tmp_path / "out", tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match=r"prompt is a cup; it must be left out with prompts="):
        config(tmp_path / "out", tmp_path / "x.txt", prompt="a cup")
    (tmp_path / "file").touch()
    (tmp_path / "x.txt").write_text("a red circle")
    with pytest.raises(UserError, match=r"is a file; name a folder, or a \.png file"):
        generate(config(tmp_path / "file", tmp_path / "x.txt"))


def test_two_processes_draw_a_share_each(tmp_path, file, whole):
    settings = "taca.gamma=1.5 lora=none dtype=float32 steps=1 guidance=2 batch_size=2"
    command = ["generate.py", "--config", "shapes_taca", *settings.split(), f"prompts={file}"]
    cluster = run_cluster(*command, f"out={tmp_path}", processes=2, devices=1)
    for done in cluster:
        assert done.returncode == 0, done.stderr[-3000:]
    assert "3 of 3 pictures to draw" in cluster[0].stdout
    assert "2 of 2 here" in cluster[0].stdout  # the first batch
    assert "wrote " not in cluster[1].stdout
    assert "all 3 pictures are there" in cluster[0].stdout
    assert sorted(contents(tmp_path)) == sorted(contents(whole))
    for path in sorted(tmp_path.glob("*.png")):
        assert abs(pixels(path) - pixels(whole / path.name)).max() <= 1
