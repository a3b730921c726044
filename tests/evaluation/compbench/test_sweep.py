"""A sweep over settings of TACA: what it draws, what it keeps, what it says, what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from taca_jax.errors import UserError
from taca_jax.evaluation.commands import run
from taca_jax.evaluation.compbench import generate as generation
from taca_jax.evaluation.compbench import sweep as sweep_module
from taca_jax.evaluation.compbench.prompts import read_lists
from taca_jax.evaluation.sweeps import Setting
from taca_jax.taca import TacaConfig
from tests.evaluation.compbench.runs import PROMPTS, draw, files_in, write_lists

BASE, CENTER, STRONG = (
    "base",
    "gamma-1.4-step-t-835-no-LoRA",
    "gamma-3-step-t-835-no-LoRA",
)
LOOSE = "gamma-1.4-step-t-500-no-LoRA"


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lists")
    write_lists(folder)
    return folder


def words(lists: Path, out: Path, scorers: Path, **changes: object) -> list[str]:
    values = {
        "prompts": lists,
        "out": out,
        "categories": "color,non_spatial",
        "num_images": 2,
        "batch_size": 4,
        "steps": 2,
        "lora": "none",
        "gammas": "1.4,3",
        "taca.gamma": 1.4,
        "blip": scorers / "blip",
        "clip": scorers / "clip",
        "phrases": "rules",
        **changes,
    }
    settings = [f"{key}={value}" for key, value in values.items()]
    return ["compbench", "sweep", "--config", "shapes_taca", *settings]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, lists, scorers) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sweep"
    run(words(lists, out, scorers))
    return out


def rows_of(out: Path) -> dict[str, dict]:
    return {row["folder"]: row for row in json.loads((out / "sweep.json").read_text())}


def test_each_setting_is_a_folder_that_generate_would_have_drawn(swept, lists, tmp_path):
    assert {each.name for each in swept.iterdir() if each.is_dir()} == {BASE, CENTER, STRONG}
    alone = tmp_path / "alone"
    draw(lists, alone, num_images=2, lora="none", **{"taca.gamma": 3})
    drawn = {name: each for name, each in files_in(swept / STRONG).items() if "annot" not in name}
    assert drawn == files_in(alone)


def test_scores_are_paired_with_the_base(swept, capsys):
    rows = rows_of(swept)
    assert list(rows) == [BASE, CENTER, STRONG]
    assert "difference" not in rows[BASE]["scores"]["BLIP-VQA"]
    for metric, category, pictures in (("BLIP-VQA", "color", 4), ("CLIPScore", "non_spatial", 6)):
        base, strong = (rows[name]["scores"][metric] for name in (BASE, STRONG))
        gap = strong["difference"]
        assert gap["value"] == pytest.approx(strong["mean"]["value"] - base["mean"]["value"])
        assert (gap["total"], gap["prompts"]) == (pictures, pictures // 2)
        assert strong["categories"] == {
            category: {key: strong[key] for key in ("mean", "difference")}
        }
    run(["compbench", "report", f"runs={swept / BASE},{swept / STRONG}", "names=plain,strong"])
    assert "strong against plain" in capsys.readouterr().out


def test_a_sweep_goes_on_and_takes_more_settings_and_prompts(
    tmp_path, swept, lists, scorers, monkeypatch, capsys
):
    out = tmp_path / "sweep"
    run(words(lists, out, scorers, limit=1))
    few = rows_of(out)
    assert few[CENTER]["scores"]["BLIP-VQA"]["difference"]["low"] is None  # of one prompt
    shutil.rmtree(out / STRONG)
    run(words(lists, out, scorers))
    assert files_in(out / STRONG) == files_in(swept / STRONG)
    assert rows_of(out) == rows_of(swept)
    before = files_in(swept)
    more = tmp_path / "more"
    shutil.copytree(swept, more)
    capsys.readouterr()
    run(words(lists, more, scorers, thresholds=500))
    said = capsys.readouterr().out
    assert said.count(": 0 of 10 pictures to draw") == 3
    assert f"{LOOSE}: 10 of 10 pictures to draw" in said
    assert list(rows_of(more)) == [BASE, CENTER, STRONG, LOOSE]
    assert files_in(swept) == before
    # Of fewer prompts, those that are there beside them do not count.
    monkeypatch.setattr(generation, "load_pipeline", None)
    monkeypatch.setattr(sweep_module, "load_pipeline", None)
    run(words(lists, more, scorers, limit=1))
    assert rows_of(more) == few


def test_what_it_prints_fits_a_terminal_and_warns(swept, lists, scorers, capsys):
    run(words(lists, swept, scorers))
    said = capsys.readouterr().out
    drawn = [line for line in said.splitlines() if line[:1] in "┏┃┡│├└"]
    assert drawn
    assert max(map(len, drawn)) <= 80
    flat = " ".join(said.split())
    assert "BLIP-VQA of color: 4 pictures of 2 prompts" in flat
    assert "not corrected for their number" in flat


GAIN = {"value": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.01, "total": 9, "prompts": 9}


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ((), "nothing is compared with the base"),
        ((GAIN | {"low": -0.1},), "no setting is better than the base beyond chance"),
        ((GAIN | {"value": 0.15}, GAIN), "the highest is setting 1. Chosen by these pictures"),
    ],
)
def test_the_highest_is_named_with_what_it_is_worth(gaps, said):
    rows = [{"name": "base", "scores": {"CLIPScore": {}}}]
    rows += [
        {"name": f"setting {i}", "scores": {"CLIPScore": {"difference": gap}}}
        for i, gap in enumerate(gaps)
    ]
    assert said in sweep_module.best("CLIPScore", rows)


def refused(*arguments: object, **changes: object) -> str:
    with pytest.raises(UserError) as error:
        run(words(*arguments, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_scored_is_refused_before_anything_is_drawn(
    tmp_path, lists, scorers, monkeypatch
):
    monkeypatch.setattr(sweep_module, "load_pipeline", lambda *_: pytest.fail("loaded"))
    out = tmp_path / "sweep"
    where = (lists, out, scorers)
    for changes, said in (
        ({"blip": "none", "clip": "none"}, "blip and clip are both none; give the folder of at"),
        ({"clip": "none"}, "categories has non_spatial, which no given scorer judges; they judge"),
        ({"categories": "spatial"}, "categories has spatial, which no given scorer judges"),
    ):
        assert said in refused(*where, **changes)
    assert "is no model folder" in refused(*where, blip=tmp_path)
    (tmp_path / "phrases.json").write_text("{}")
    assert "finds none in " in refused(*where, phrases=tmp_path / "phrases.json")
    assert "lora=absent is not there" in refused(*where, loras="absent")
    assert not out.exists()


def test_a_list_of_ones_own(tmp_path, lists, scorers):
    own = tmp_path / "own.txt"
    own.write_text("\n".join(PROMPTS["color"]))
    assert read_lists(str(own), ["shape"]) == {"shape": list(PROMPTS["color"])}
    out = tmp_path / "sweep"
    said = refused(lists, out, scorers, prompts=own)
    assert "is one list, and categories are color,non_spatial; give one" in said
    own.write_text("a red circle\n\n")
    said = refused(lists, out, scorers, prompts=own, categories="color")
    assert "own.txt: line 2 is empty; give a prompt in each line" in said


def test_long_names_are_cut_and_stay_distinct():
    loras = [f"{'folder/' * 40}{name}.safetensors" for name in "ab"]
    names = {sweep_module.folder_name(Setting(TacaConfig(), lora, None)) for lora in loras}
    assert len(names) == 2
    assert max(map(len, names)) < 120
