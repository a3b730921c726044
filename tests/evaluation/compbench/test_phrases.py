"""Noun phrases of prompts."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.phrases import by_rules, phrase_splitter
from taca_jax.evaluation.compbench.prompts import read_prompts
from tests.shared import shared_path


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),  # upstream's example
        ("rubber gloves and a fluffy teddy bear", ["rubber gloves", "a fluffy teddy bear"]),
        (
            "A black and white cat sits in a white sink.",
            ["A black and white cat", "a white sink"],
        ),
        (
            "A long, narrow kitchen with black and white tiles.",
            ["A long, narrow kitchen", "black and white tiles"],
        ),
        (
            "two white sheep, a black goat and a white goat in a field",
            ["two white sheep", "a black goat", "a white goat", "a field"],
        ),
        (
            "The glass vase and metallic stand display the wooden flowers.",
            ["The glass vase", "metallic stand", "the wooden flowers"],
        ),
        (
            "The roof and the archway were the defining features of the temple.",
            ["The roof", "the archway", "the defining features", "the temple"],
        ),
    ],
)
def test_rules(prompt, phrases):
    assert by_rules(prompt) == phrases


def test_rules_split_the_simple_prompts_of_the_published_lists_at_their_and():
    """Those without any of the words that make a sentence: 699 of the 900."""
    lists = shared_path("assets/prompts/t2i_compbench")
    sentence = re.compile(r",|\b(of|in|on|with|is|are|was|were|the|sat)\b", re.IGNORECASE)
    simple = 0
    for category in ("color", "shape", "texture"):
        for prompt in read_prompts(lists, category):
            parts = prompt.rstrip(".").split(" and ")
            if len(parts) == 2 and not sentence.search(prompt):
                simple += 1
                assert by_rules(prompt) == parts
    assert simple == 699


def test_rules_find_phrases_in_every_published_prompt():
    lists = shared_path("assets/prompts/t2i_compbench")
    split = phrase_splitter("rules")
    for category in ("color", "shape", "texture"):
        assert all(len(split(prompt)) >= 2 for prompt in read_prompts(lists, category))


def test_places_are_no_things_and_eight_are_enough():
    split = phrase_splitter("rules")
    assert split("a cup on the top of a table") == ["a cup", "the top", "a table"]
    assert split("a cup on top and a spoon on the left") == ["a cup", "a spoon"]
    many = " and ".join(f"a thing{i}" for i in range(10))
    assert split(many) == [f"a thing{i}" for i in range(8)]
    with pytest.raises(UserError, match="phrases=rules finds none in 'on top'"):
        split("on top")


def test_a_file_of_phrases(tmp_path):
    file = tmp_path / "phrases.json"
    file.write_text(json.dumps({"a red car": ["a red car", "the left"]}))
    split = phrase_splitter(str(file))
    assert split("a red car") == ["a red car"]
    with pytest.raises(UserError, match="finds none in 'a blue car'; name a JSON file"):
        split("a blue car")
    for damaged, message in {
        "[": "is not JSON",
        "[]": "must map prompts to lists",
        '{"a": "b"}': "must map prompts to lists",
    }.items():
        file.write_text(damaged)
        with pytest.raises(UserError, match=message):
            phrase_splitter(str(file))
    with pytest.raises(UserError, match="is neither spacy, rules, nor a file"):
        phrase_splitter("spaci")


def test_spacy_and_its_model_are_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"needs spaCy .* or set phrases=rules"):
        phrase_splitter("spacy")

    def missing(name):
        raise OSError(f"[E050] Can't find model '{name}'")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=missing))
    with pytest.raises(UserError, match="spaCy has no model en_core_web_sm"):
        phrase_splitter("spacy")


def test_spacys_chunks_are_taken_as_they_are(monkeypatch):
    def parse(prompt):
        chunks = [SimpleNamespace(text=text) for text in ("a cup", "the left", "a table")]
        return SimpleNamespace(noun_chunks=chunks)

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=lambda name: parse))
    assert phrase_splitter("spacy")("a cup left of a table") == ["a cup", "a table"]
