"""The table: the paper's rows, ours beside them, and how much two runs differ."""

import json

import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.evaluation.commands import run
from taca_jax.evaluation.compbench.folders import prompts_text, write_result
from taca_jax.evaluation.compbench.published import PUBLISHED

PROMPTS = ["a red car", "a blue car", "a green car"]


@pytest.fixture
def runs(tmp_path):
    """Two runs of 3 prompts with 2 pictures each; `taca` is better by 0.1, 0.2 and 0.3."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.6, 6)
    better = np.repeat([0.1, 0.2, 0.3], 2)
    for name, scores in {"base": base, "taca": base + better}.items():
        for category, folder in {
            "color": "annotation_blip",
            "spatial": "labels/annotation_obj_detection_2d",
            "numeracy": "annotation_num",
        }.items():
            place = tmp_path / name / category
            write_result(place / folder / "vqa_result.json", dict(enumerate(scores)))
            (place / "prompts.json").write_text(prompts_text(PROMPTS, 2))
    return tmp_path


def report(*words: object) -> None:
    run(["compbench", "report", *map(str, words)])


def test_the_published_rows_alone(capsys):
    report()
    said = capsys.readouterr().out
    for name, row in PUBLISHED.items():
        assert name in said
        assert all(f"{score:.4f}" in said for score in row.values())
    assert "github.com/Vchitect/TACA" in said


def test_published_figures_of_the_best_known_row():
    """The abstract's gains of FLUX.1-Dev with r = 64: 16.4 % of spatial, 5.9 % of shape."""
    base, taca = PUBLISHED["FLUX.1-Dev"], PUBLISHED["FLUX.1-Dev + TACA (r = 64)"]
    assert round(100 * (taca["spatial"] / base["spatial"] - 1), 1) == 16.4
    assert round(100 * (taca["shape"] / base["shape"] - 1), 1) == 5.9


def test_runs_with_intervals_and_their_difference(runs, capsys):
    out = runs / "report.json"
    report(f"runs={runs / 'base'},{runs / 'taca'}", f"out={out}")
    said = capsys.readouterr().out
    tree = json.loads(out.read_text())
    assert tree["published"]["rows"]["SD3.5-Medium"]["color"] == 0.789
    base, taca = tree["runs"]["base"], tree["runs"]["taca"]
    assert "against_first" not in base
    gap = taca["against_first"]["color"]
    # Prompts are the units: the mean of 0.1, 0.2, 0.3 with Student's t of two degrees of freedom.
    assert gap["value"] == pytest.approx(0.2)
    half = 4.302653 * 0.1 / 3**0.5
    assert (gap["low"], gap["high"]) == pytest.approx((0.2 - half, 0.2 + half))
    assert (gap["total"], gap["prompts"]) == (6, 3)
    assert taca["means"]["color"]["value"] == pytest.approx(base["means"]["color"]["value"] + 0.2)
    assert "+0.2000" in said
    drawn = [line for line in said.splitlines() if line[:1] in "┏┃┡│├└"]
    assert max(map(len, drawn)) <= 80
    assert "taca against base" in said
    assert f"{base['means']['numeracy']['value']:.4f}" in said
    assert "base, spatial: 6 pictures of 3 prompts; scored by another program" in said


def test_rows_have_the_names_that_are_given(runs, capsys):
    (runs / "other").mkdir()
    (runs / "taca").rename(runs / "other" / "base")
    both = f"runs={runs / 'base'},{runs / 'other' / 'base'}"
    report(both)
    assert f"{runs / 'other' / 'base'}, color: 6 pictures" in capsys.readouterr().out
    report(both, "names=plain,TACA [r=64]")
    assert "TACA [r=64] against plain" in capsys.readouterr().out


def test_what_cannot_be_reported_is_refused(runs):
    def refused(*words) -> str:
        with pytest.raises(UserError) as error:
            report(*words)
        return str(error.value)

    both = f"runs={runs / 'base'},{runs / 'taca'}"
    assert "the folder" in refused(both, f"out={runs / 'nowhere' / 'report.json'}")
    record = runs / "taca" / "color" / "prompts.json"
    record.write_text(prompts_text(["a car", "a bus", "a bike"], 2))
    said = refused(both)
    assert "color: picture 0 is of 'a red car' in the first run and of 'a car' in another" in said
    record.unlink()
    assert "has no picture 0, which is scored" in refused(both)
    (runs / "none" / "color").mkdir(parents=True)
    assert "has no scores; `compbench score pictures=" in refused(f"runs={runs / 'none'}")
    result = runs / "base" / "color" / "annotation_blip" / "vqa_result.json"
    result.write_text("{}")
    assert "is not as upstream writes it" in refused(both)
