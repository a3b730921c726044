"""generate.py on the small model that comes with the package: files, metadata, refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.pipelines.batching import batch_size
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.generate import generate
from taca_jax.pipelines.loras import check_lora
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import TacaConfig
from taca_jax.weights.pipeline_folders import StoredModel, open_pipeline
from taca_jax.weights.shipped import find_weights

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle and a blue square"


LOADING = "taca_jax.pipelines.pipeline.Pipeline.from_pretrained"


def config(out: Path, **changes) -> GenerateConfig:
    values = {
        "base": "shapes_base",
        "prompt": PROMPT,
        "taca": TacaConfig(gamma=1.5, threshold=835),
        "steps": 3,
        "dtype": "float32",
        "out": str(out),
    }
    return GenerateConfig(**{**values, **changes})


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


def test_a_picture_carries_its_settings(tmp_path):
    [path] = generate(config(tmp_path / "one.png", seed=7))
    with Image.open(path) as picture:
        assert picture.size == (520, 520)  # 40 x 40 pixels, each a square of 13 x 13
        settings = json.loads(picture.text["taca_jax"])
    assert settings["prompt"] == PROMPT
    assert settings["seed"] == 7
    assert settings["taca"]["gamma"] == 1.5


def test_the_same_settings_give_the_same_picture_and_taca_another(tmp_path):
    def drawn(name: str, **changes) -> np.ndarray:
        [path] = generate(config(tmp_path / name, **changes))
        return pixels(path)

    first = drawn("a.png")
    np.testing.assert_array_equal(first, drawn("b.png"))
    assert (first != drawn("c.png", taca=None)).any()


def test_several_pictures_are_numbered_and_go_on_from_the_seed(tmp_path):
    paths = generate(config(tmp_path / "many.png", num_images=2, seed=3))
    assert [path.name for path in paths] == ["many-000.png", "many-001.png"]
    [single] = generate(config(tmp_path / "single.png", seed=4))
    assert abs(pixels(paths[1]) - pixels(single)).max() <= 1  # other batch sizes, other rounding


def test_batches_of_any_size_draw_the_same_pictures(tmp_path, capsys):
    at_once = generate(config(tmp_path / "once.png", num_images=4, seed=3))
    assert "in batches of" not in capsys.readouterr().out
    for given, size in {1: 1, 3: 2}.items():
        name = f"batched{given}"
        batched = generate(config(tmp_path / f"{name}.png", num_images=4, seed=3, batch_size=given))
        assert f"4 pictures in batches of {size} (batch_size)" in capsys.readouterr().out
        assert [path.name for path in batched] == [f"{name}-{i:03d}.png" for i in range(4)]
        for one, other in zip(at_once, batched, strict=True):
            assert abs(pixels(one) - pixels(other)).max() <= 1


def test_pictures_are_written_as_they_come(tmp_path, monkeypatch):
    written, call = [], Pipeline.__call__

    def counted(self, *arguments, **options):
        written.append(len(list(tmp_path.glob("*.png"))))
        assert len(options["prompt_embeds"]) == 2  # the last filled up
        return call(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "__call__", counted)
    generate(config(tmp_path / "many.png", num_images=3, batch_size=2))
    assert written == [0, 2]


def test_batches_are_of_one_size_and_fit_the_devices():
    stored = open_pipeline("shapes_base")  # 100 image tokens a picture

    def sizes(devices, **changes):
        return batch_size(config(Path("x.png"), **changes), stored, devices)

    assert sizes(1) == 1
    assert sizes(1, num_images=40) == 40
    assert sizes(1, num_images=64) == 32
    assert sizes(2, num_images=64) == 64
    assert sizes(1, num_images=4, height=256, width=256) == 1
    assert sizes(8, num_images=9, height=256, width=256) == 5
    assert sizes(1, num_images=9, batch_size=4) == 3


def test_in_stages_the_pictures_are_exactly_the_same(tmp_path, capsys):
    changes = {"num_images": 3, "batch_size": 2, "lora": "shapes_taca.safetensors"}
    resident = generate(config(tmp_path / "resident.png", **changes))
    assert "take turns" not in capsys.readouterr().out
    staged = generate(config(tmp_path / "staged.png", **changes, stages=True))
    assert "models take turns in memory" in capsys.readouterr().out
    for one, other in zip(resident, staged, strict=True):
        np.testing.assert_array_equal(pixels(one), pixels(other))


def test_in_stages_each_model_is_read_once_whatever_is_drawn(tmp_path, monkeypatch):
    read, original = [], StoredModel.__init__

    def init(self, where, config, load, check):
        original(self, where, config, lambda options: read.append(where) or load(options))

    monkeypatch.setattr(StoredModel, "__init__", init)
    lora = "shapes_taca.safetensors"
    changes = {"num_images": 2, "batch_size": 1, "guidance": 2.0, "lora": lora, "stages": True}
    generate(config(tmp_path / "x.png", **changes, compare=True))
    assert [Path(where).name for where in read] == ["text_encoder", "transformer", "autoencoder"]


def test_compare_shows_plain_taca_and_lora(tmp_path):
    [two] = generate(config(tmp_path / "two.png", compare=True))
    [three] = generate(config(tmp_path / "three.png", compare=True, lora="shapes_taca.safetensors"))
    assert pixels(three).shape[1] > pixels(two).shape[1]


def test_a_style_is_in_all_columns_and_without_taca_too(tmp_path, capsys):
    style = tmp_path / "style.safetensors"
    shutil.copy(find_weights("shapes_taca.safetensors"), style)
    both = f"{style}@always:2,shapes_taca.safetensors"

    def columns(lora: str, count: int) -> list[np.ndarray]:
        [path] = generate(config(tmp_path / f"{count}.png", compare=True, lora=lora))
        return np.split(pixels(path)[40:-60, 8:], count, axis=1)

    plain, taca, with_lora = columns(both, 3)
    said = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "used at 2, always on" in said
    assert "used at 1, with TACA" in said
    assert (taca != with_lora).any()
    without, _ = columns(f"{style}@always:0", 2)
    assert (plain != without).any()
    [alone] = generate(config(tmp_path / "a.png", taca=None, lora=f"{style}@always:2"))
    [none] = generate(config(tmp_path / "b.png", taca=None))
    assert (pixels(alone) != pixels(none)).any()


def test_a_lora_that_is_written_wrongly_says_how_it_is_written(tmp_path):
    lora = "shapes_taca.safetensors@tacca"
    with pytest.raises(UserError, match=r"is not there; .* \(a LoRA is FILE, FILE:STRENGTH, FILE@"):
        generate(config(tmp_path / "x.png", lora=lora))


def test_previews_are_written_beside_the_picture(tmp_path, capsys):
    [path] = generate(config(tmp_path / "x.png", preview="own"))
    assert f"previews: {tmp_path / 'x-preview.png'}, after each step" in capsys.readouterr().out
    # The last step is predicted to become what it becomes.
    np.testing.assert_array_equal(pixels(tmp_path / "x-preview.png"), pixels(path))


def test_each_column_of_a_comparison_has_its_previews(tmp_path, capsys):
    lora = "shapes_taca.safetensors"
    changes = {"compare": True, "preview": "own", "lora": lora, "num_images": 2, "batch_size": 1}
    generate(config(tmp_path / "x.png", **changes))
    names = [f"x-preview-{column}.png" for column in ("plain", "taca", "taca-lora")]
    said = capsys.readouterr().out
    assert f"previews: {', '.join(str(tmp_path / name) for name in names)}, after each" in said
    columns = [pixels(tmp_path / name) for name in names]
    assert [column.shape for column in columns] == [(520, 520, 3)] * 3
    assert (columns[0] != columns[1]).any()
    assert (columns[1] != columns[2]).any()
    # The second batch's, which is the second row.
    grid = pixels(tmp_path / "x.png")
    lower = grid[grid.shape[0] // 2 :]
    assert any(np.array_equal(lower[y : y + 520, 8:528], columns[0]) for y in range(40))


def test_previews_without_taca_are_of_the_picture(tmp_path):
    changes = {"preview": "own", "taca": None, "num_images": 3, "batch_size": 2}
    paths = generate(config(tmp_path / "x.png", **changes))
    np.testing.assert_array_equal(pixels(tmp_path / "x-preview.png"), pixels(paths[2]))


def test_a_missing_previewer_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(LOADING, lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"taef1 is not there; .* tiny one's two files"):
        generate(config(tmp_path / "x.png", preview=str(tmp_path / "taef1")))


def test_a_missing_lora_is_refused_before_the_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(LOADING, lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"nowhere\.safetensors is not there; .* lora=none"):
        generate(config(tmp_path / "x.png", lora="nowhere.safetensors"))


def test_without_taca_a_lora_is_said_not_to_be_used(tmp_path, capsys):
    generate(config(tmp_path / "x.png", taca=None, lora="shapes_taca.safetensors"))
    assert "shapes_taca.safetensors is not used: it acts only while" in capsys.readouterr().out
    # What is gated with TACA need not be there; of others only the file says how they are gated.
    check_lora(config(tmp_path / "x.png", taca=None, lora="not_yet_trained.safetensors@taca"))
    with pytest.raises(UserError, match=r"lora=not_yet_trained\.safetensors is not there"):
        check_lora(config(tmp_path / "x.png", taca=None, lora="not_yet_trained.safetensors"))
    with pytest.raises(UserError, match=r"lora=not_yet_trained\.safetensors is not there"):
        check_lora(config(tmp_path / "x.png", lora="not_yet_trained.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a red dragon"}, "dragon"),
        ({"base": "nowhere"}, "nowhere is not there"),
        ({"height": 41}, "multiples of 4"),
        ({"mesh": MeshConfig(tensor=2)}, "2 does not divide the 1 device"),
    ],
)
def test_refusals_are_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        generate(config(tmp_path / "x.png", **changes))
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        generate(config(tmp_path / "absent" / "x.png"))


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        generate(config(tmp_path / "x.png"))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written to"):
        generate(config(tmp_path / "y.png"))


def test_the_command_fails_in_one_line():
    command = [sys.executable, "generate.py", "--config", "shapes_taca", "prompt=a red dragon"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
