"""The recogniser's error is measured against what was drawn."""

import json

import pytest

from taca_jax.errors import UserError
from taca_jax.evaluation.shapes import recogniser_error
from taca_jax.evaluation.shapes.recogniser_error import (
    NOTHING,
    Counts,
    Damage,
    RecogniserConfig,
    measure,
    measure_recogniser,
    summary,
)

SMALL = RecogniserConfig(scenes=120, noise=(8.0, 100.0), blur=(0.5, 3.0))


def test_true_pictures_are_read_without_an_error_and_damaged_ones_less_well(tmp_path, capsys):
    out = tmp_path / "recogniser.json"
    measure_recogniser(RecogniserConfig(**{**vars(SMALL), "out": str(out)}))
    rows = json.loads(out.read_text())
    assert rows["none"]["accepted"]["value"] == rows["none"]["refused"]["value"] == 1
    assert rows["none"]["color"]["value"] == rows["none"]["texture"]["value"] == 1
    assert rows["noise 8"]["accepted"]["value"] == 1
    assert rows["noise 100"]["accepted"]["value"] < 0.9
    assert rows["blur 3"]["shape"]["value"] < rows["blur 0.5"]["shape"]["value"] == 1
    # Nearly all captions are false without the half object, and are refused.
    assert rows["half"]["refused"]["total"] > 2 * 110
    assert rows["half"]["refused"]["value"] > 0.97
    printed = capsys.readouterr().out
    tables = printed.partition("wrote ")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "100.00 (" in printed
    for word in ("half", "true captions accepted", "checkered", NOTHING):
        assert word in printed
    # Every object is counted once for each attribute.
    drawn = {name: sum(row["confusions"]["color"].values()) for name, row in rows.items()}
    assert drawn["none"] == drawn["noise 100"] == drawn["half"] + SMALL.scenes


def test_a_blind_recogniser_accepts_nothing_and_reads_nothing(monkeypatch):
    monkeypatch.setattr(recogniser_error, "read_scene", lambda image: [])
    counts = measure(RecogniserConfig(scenes=60, noise=(), blur=()))
    rows = summary(counts)
    assert rows["none"]["accepted"]["value"] == 0
    assert rows["none"]["refused"]["value"] == 1
    assert all(read == NOTHING for _, read in counts[Damage("none")].confusions("shape"))


def test_intervals_take_pictures_as_the_independent_units():
    # Of every picture both captions are false, and all of its objects are read alike.
    objects = [(picture, "red", "red" if picture else "blue") for picture in range(4)] * 3
    verdicts = [(picture, False, picture == 0) for picture in range(4)] * 2
    readings = dict.fromkeys(recogniser_error.ATTRIBUTES, objects)
    row = summary({Damage("none"): Counts(verdicts, readings)})["none"]
    assert row["accepted"] is None
    assert (row["refused"]["total"], row["refused"]["pictures"]) == (8, 4)
    assert (row["color"]["total"], row["color"]["pictures"]) == (12, 4)
    once = summary({Damage("none"): Counts(verdicts[:4], readings)})["none"]["refused"]
    assert row["refused"]["value"] == once["value"] == 0.75
    # The second verdict on a picture says nothing new.
    assert row["refused"]["high"] - row["refused"]["low"] >= once["high"] - once["low"]


def test_mistakes_are_reported_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match=r"noise is \(0.0,\); it must be positive"):
        RecogniserConfig(noise=(0.0,))
    with pytest.raises(UserError, match="its folder does not exist"):
        measure_recogniser(RecogniserConfig(out=str(tmp_path / "absent" / "x.json")))
