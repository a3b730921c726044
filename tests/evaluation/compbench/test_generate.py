"""Drawing pictures: which, from which noise, and the same bytes whatever stops it."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.evaluation.compbench import generate as generation
from taca_jax.evaluation.record import RECORD
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import TacaConfig
from taca_jax.weights.shipped import find_weights
from tests.evaluation.compbench.runs import PROMPTS, draw, files_in, words, write_lists
from tests.evaluation.weights import change_last_byte
from tests.processes import ended, run_cluster, start_python


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    write_lists(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, lists) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    draw(lists, out)
    return out


def test_layout_seeds_and_metadata_are_upstreams(whole):
    names = [
        f"color/samples/{prompt}_{number:06}.png"
        for number, prompt in enumerate(np.repeat(PROMPTS["color"], 3))
    ]
    names += [
        f"non_spatial/samples/{prompt}_{number:06}.png"
        for number, prompt in enumerate(np.repeat(PROMPTS["non_spatial"], 3))
    ]
    names += ["color/prompts.json", "non_spatial/prompts.json"]
    assert sorted(files_in(whole)) == sorted(names)
    pipeline = Pipeline.from_pretrained("shapes_base", dtype="float32")
    pipeline.load_lora("shapes_taca.safetensors")
    settings = json.loads((whole / RECORD).read_text())["config"]
    assert (settings["seed"], settings["taca"]["threshold"]) == (42, 835)
    # The third picture of the second prompt, with others beside it than in its batch.
    picture = Image.open(whole / names[5])
    said = json.loads(picture.text["taca_jax"])
    assert (said["prompt"], said["seed"]) == (PROMPTS["color"][1], 44)
    assert "out" not in said
    taca = TacaConfig(**settings["taca"])
    four = pipeline([PROMPTS["color"][1]] * 4, steps=2, seed=42, taca=taca, progress=False).images
    apart = [np.abs(np.asarray(picture, int) - np.asarray(each, int)).max() for each in four]
    assert apart[2] <= 1
    assert min(apart[:2] + apart[3:]) > 20


def test_a_run_that_is_stopped_anywhere_ends_in_the_same_files(
    tmp_path, lists, whole, monkeypatch, capsys
):
    """Stopped within a batch, at its first picture, between a file and its place; then pictures are
    removed."""
    write, out = generation._write, tmp_path / "run"

    class Killed(BaseException):
        pass

    for survive in (2, 0, 5):
        left = [survive]

        def killing(*arguments, left=left):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            write(*arguments)

        monkeypatch.setattr(generation, "_write", killing)
        with pytest.raises(Killed):
            draw(lists, out)
        monkeypatch.setattr(generation, "_write", write)
    assert len(list(out.glob("*/samples/*.png"))) == 7
    with monkeypatch.context() as patch:
        patch.setattr(generation.os, "replace", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            draw(lists, out)
    draw(lists, out)
    assert files_in(out) == files_in(whole)
    assert "8 of 15 pictures to draw" in capsys.readouterr().out

    for path in list(out.glob("*/samples/*_000004.png")):
        path.unlink()
    draw(lists, out)
    assert files_in(out) == files_in(whole)

    monkeypatch.setattr(generation, "load_pipeline", None)  # nothing is loaded if all is there
    draw(lists, out)
    assert "0 of 15 pictures to draw" in capsys.readouterr().out


def test_pictures_that_are_lost_meanwhile_are_counted(tmp_path, lists, monkeypatch):
    write = generation._write

    def losing(path, number, *rest):
        if number != 2:
            write(path, number, *rest)

    monkeypatch.setattr(generation, "_write", losing)
    assert "run: 1 of 9 pictures are not there, although all" in refused(
        lists, tmp_path / "run", categories="non_spatial"
    )


def test_a_part_first_changes_nothing(tmp_path, lists, whole):
    out = tmp_path / "run"
    draw(lists, out, categories="non_spatial", limit=1)
    assert len(list(out.glob("*/samples/*.png"))) == 3
    draw(lists, out, limit=2)
    assert len(list(out.glob("*/samples/*.png"))) == 12
    draw(lists, out)
    assert files_in(out) == files_in(whole)


def refused(*arguments, **changes) -> str:
    with pytest.raises(UserError) as error:
        draw(*arguments, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pictures_of_other_settings_or_prompts_do_not_get_between(tmp_path, lists, whole):
    before = files_in(whole)
    assert "seed is 42 there, 7 here; name another out" in refused(lists, whole, seed=7)
    assert "lora is shapes_taca.safetensors there, none here" in refused(lists, whole, lora="none")
    said = refused(lists, whole, taca="none", batch_size=5)
    assert "taca is " in said
    assert "batch_size is 4 there, 5 here" in said
    changed = tmp_path / "lists"
    shutil.copytree(lists, changed)
    (changed / "color_val.txt").write_text("a red circle\na blue circle")
    assert "prompts.json has other prompts than the list of color" in refused(changed, whole)
    assert files_in(whole) == before
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare)
    (bare / RECORD).unlink()
    assert "holds something else" in refused(lists, bare)


def test_pictures_of_two_loras_do_not_mix(tmp_path, lists, whole, monkeypatch, capsys):
    moved, lora = tmp_path / "moved", tmp_path / "lora.safetensors"
    shutil.copytree(whole, moved)
    shutil.copy(find_weights("shapes_taca.safetensors"), lora)
    monkeypatch.setattr(generation, "load_pipeline", None)
    draw(lists, moved, lora=lora)  # the same LoRA in another place, and the folder too
    assert "0 of 15 pictures to draw" in capsys.readouterr().out
    before = files_in(moved)
    change_last_byte(lora)
    assert f"{lora} has changed since; name another out" in refused(lists, moved, lora=lora)
    assert files_in(moved) == before
    for picture in moved.glob("*/samples/*.png"):
        picture.unlink()
    assert f"{lora} has changed since" in refused(lists, moved, lora=lora)


def test_a_run_that_cannot_start_leaves_nothing(tmp_path, lists):
    out = tmp_path / "run"
    assert "lora=nowhere is not there" in refused(lists, out, lora="nowhere")
    assert "color_val.txt is not there; fetch" in refused(tmp_path, out)
    assert "nowhere is not there" in refused(lists, out, base="nowhere")
    other = tmp_path / "lists"
    other.mkdir()
    (other / "color_val.txt").write_text("a red circle\na green bench\n")
    said = refused(other, out, categories="color", limit=1)
    assert "the word 'bench' is unknown" in said
    assert not out.exists()


@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_in_the_same_files(tmp_path, lists, whole):
    out = tmp_path / "run"
    command = ["-m", "taca_jax.evaluation", *words(lists, out)]
    for wanted in (1, 4, 7):
        process = start_python(*command)
        while process.poll() is None and len(list(out.glob("*/samples/*.png"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert ended(process).returncode == -signal.SIGKILL
    assert len(files_in(out)) < len(files_in(whole))
    done = ended(start_python(*command))
    assert done.returncode == 0, done.stderr
    assert files_in(out) == files_in(whole)


@pytest.mark.slow
def test_two_processes_draw_the_files_of_one(tmp_path, lists, whole):
    out = tmp_path / "run"
    command = ["-m", "taca_jax.evaluation", *words(lists, out)]
    for done in run_cluster(*command, processes=2, devices=1):
        assert done.returncode == 0, done.stderr
    assert files_in(out) == files_in(whole)
