"""Captions to token ids."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taca_jax.data.shapes.captions import VOCABULARY
from taca_jax.data.shapes.examples import GeneratedShapes, random_prompts
from taca_jax.errors import UserError
from taca_jax.pipelines.text import save_tokenizers
from taca_jax.text.tokenizers import (
    ByteTokenizer,
    FolderTokenizer,
    JoinedTokenizer,
    WordTokenizer,
    announce_cuts,
    load_tokenizer,
)
from tests.shared import shared_path

END = VOCABULARY.index("</s>")


def test_words_end_and_are_padded():
    tokenizer = load_tokenizer("shapes", 6)
    tokens = tokenizer(["a red circle", "", "A  Red\nSquare"])
    assert tokens.dtype == np.int32
    assert tokens.shape == (3, 6)
    words = [[VOCABULARY[i] for i in row] for row in tokens]
    assert words[0] == ["a", "red", "circle", "</s>", "<pad>", "<pad>"]
    assert words[1] == ["</s>"] + ["<pad>"] * 5
    assert words[2][:4] == ["a", "red", "square", "</s>"]
    assert tokenizer.vocab_size == len(VOCABULARY)
    assert VOCABULARY[tokenizer.pad_id] == "<pad>"


def test_every_caption_of_the_shapes_data_fits_16_tokens():
    tokenizer = WordTokenizer(16)
    captions = [example["caption"] for example in GeneratedShapes("train", 300)]
    captions += [caption for _, caption in random_prompts("test", 60, 0)]
    tokens = tokenizer(captions)
    assert ((tokens == END).sum(axis=1) == 1).all()
    assert len(np.unique(tokens, axis=0)) == len(set(captions))


def test_words_that_are_unknown_or_too_many_are_refused():
    tokenizer = WordTokenizer(4)
    assert tokenizer(["a red circle"]).shape == (1, 4)
    with pytest.raises(UserError, match="'a red red circle' takes 5 tokens; this model reads 4"):
        tokenizer(["a red red circle"])
    with pytest.raises(
        UserError, match="the word 'dog' is unknown to this model; it knows: "
    ) as refusal:
        tokenizer(["a red dog"])
    assert "<pad>" not in str(refusal.value)
    assert "circle" in str(refusal.value)


@given(st.text(max_size=40), st.integers(1, 50))
def test_bytes_read_back(caption, length):
    tokenizer = ByteTokenizer(length)
    (row,) = tokenizer([caption])
    assert row.dtype == np.int32
    assert row.max() < tokenizer.vocab_size
    content = row[row != tokenizer.pad_id]
    assert content[-1] == 1
    given_bytes = caption.encode(errors="replace")
    assert bytes((content[:-1] - 3).tolist()) == given_bytes[: length - 1]


def test_bytes_that_are_no_text_do_not_stop_it():
    assert load_tokenizer("bytes", 8)(["caf\udce9"]).shape == (1, 8)


def test_a_folders_tokenizer_is_the_originals():
    folder = shared_path("assets/t5_tokenizer")
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(str(folder), 12)
    captions = ["a red circle", "", "a photo of an astronaut riding a horse on the moon at night"]
    tokens = tokenizer(captions)
    assert tokens.shape == (3, 12)
    assert tokens.dtype == np.int32
    assert tokenizer.pad_id == 0
    assert (tokens == 1).sum(axis=1).tolist() == [1, 1, 1]  # also where it was cut
    original = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert tokens[0, :4].tolist() == original("a red circle")["input_ids"][:4]
    assert tokens.max() < tokenizer.vocab_size


def test_folders_without_a_usable_tokenizer_are_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"'nowhere' is neither shapes, bytes nor a folder with a"):
        load_tokenizer("nowhere", 8)
    for content in (None, "{", "[]", '{"model": {}}'):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="no tokenizer could be read from") as refusal:
            load_tokenizer(str(tmp_path), 8)
        assert "\n" not in str(refusal.value)


PROMPTS_PER_FILE = 10
LISTS = ("color_val", "complex_val", "numeracy", "spatial_val", "texture_val")
ODD = [
    "",
    " ",
    "a photo of " + "a very very long street with many red and blue houses, " * 60,
    "🐈‍⬛🔥 a cat 👩🏽‍🚀 in space",
    "一只红色的猫坐在蓝色的椅子上，背景是山",
    "Кошка на крыше, рядом с café — naïve façade",
    "قطة حمراء على كرسي أزرق",
    "UPPER lower 12345 <|endoftext|> </s> <pad> {x}\n\ttabs",
    "e\u0301 \u00e9 \u200b\ufeff zero width",
]


def compbench() -> list[str]:
    """50 prompts of T2I-CompBench, of five kinds."""
    prompts = []
    for name in LISTS:
        text = shared_path(f"assets/prompts/t2i_compbench/{name}.txt").read_text()
        prompts += [line.strip() for line in text.splitlines() if line.strip()][:PROMPTS_PER_FILE]
    assert len(set(prompts)) == 50
    return prompts


def clip_original(**options):
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTokenizer.from_pretrained(
        str(shared_path("assets/clip_tokenizer")), **options
    )


def t5_original():
    transformers = pytest.importorskip("transformers")
    file = shared_path("assets/t5_tokenizer/tokenizer.json")
    return transformers.T5TokenizerFast(tokenizer_file=str(file))


def ids_in_diffusers(original, prompts, length) -> np.ndarray:
    """As its pipelines call a tokenizer."""
    return original(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    ).input_ids


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"], ids=["L", "bigG"])
def test_ids_of_clip_are_transformers(tmp_path, pad):
    """CLIP-bigG's folder pads with "!", CLIP-L's with the end token."""
    original = clip_original(pad_token=pad)
    original.save_pretrained(str(tmp_path))
    prompts = compbench() + ODD
    ids = FolderTokenizer(tmp_path, 77)(prompts)
    np.testing.assert_array_equal(ids, ids_in_diffusers(original, prompts, 77))
    assert ids.shape == (len(prompts), 77)
    assert ids.dtype == np.int32
    bare = FolderTokenizer(shared_path("assets/clip_tokenizer"), 77)(prompts)
    assert np.array_equal(bare, ids) == (pad == "<|endoftext|>")


@pytest.mark.parametrize("length", [256, 512])
def test_ids_of_t5_are_transformers(length):
    prompts = compbench() + ODD
    ids = FolderTokenizer(shared_path("assets/t5_tokenizer"), length)(prompts)
    np.testing.assert_array_equal(ids, ids_in_diffusers(t5_original(), prompts, length))


def test_a_saved_tokenizer_reads_the_same(tmp_path):
    for name in ("clip_tokenizer", "t5_tokenizer"):
        tokenizer = FolderTokenizer(shared_path(f"assets/{name}"), 40)
        tokenizer.save(tmp_path / name)
        again = FolderTokenizer(tmp_path / name, 40)
        np.testing.assert_array_equal(again(ODD), tokenizer(ODD))
        assert again.pad_id == tokenizer.pad_id


def test_of_joined_tokenizers_the_last_is_said_to_be_saved(tmp_path):
    own = load_tokenizer(str(shared_path("assets/clip_tokenizer")), 77)
    assert not save_tokenizers(tmp_path, JoinedTokenizer((own, ByteTokenizer(6))))
    assert (tmp_path / "tokenizer").is_dir()
    assert save_tokenizers(tmp_path, JoinedTokenizer((own, own)))


def test_joined_ids_stand_side_by_side():
    joined = JoinedTokenizer((WordTokenizer(4), ByteTokenizer(6)))
    ids = joined(["a red", ""])
    assert ids.shape == (2, joined.length) == (2, 10)
    np.testing.assert_array_equal(ids[:, :4], WordTokenizer(4)(["a red", ""]))
    np.testing.assert_array_equal(ids[:, 4:], ByteTokenizer(6)(["a red", ""]))
    assert joined.pad_id == ByteTokenizer(6).pad_id
    both = JoinedTokenizer((ByteTokenizer(6), ByteTokenizer(4)))
    assert [line.split(";")[0] for line in both.cuts(["abcd"])] == ["this model reads 4 tokens"]


@pytest.mark.parametrize("name", ["clip_tokenizer", "t5_tokenizer"])
def test_what_is_cut_is_said_in_one_line(name, caplog, capfd):
    tokenizer = FolderTokenizer(shared_path(f"assets/{name}"), 8)
    fits, cut = "a red circle", "a red circle left of one blue square and\nTWO green crosses"
    with caplog.at_level(logging.WARNING, "taca_jax"):
        announce_cuts(tokenizer, [fits, cut, cut])
    (record,) = caplog.records
    line = record.getMessage()
    assert f"{name} reads 8 tokens" in line
    assert "\n" not in line
    said = line.partition('are cut: "')[2].removesuffix('"')
    # With what is read, it is the whole prompt.
    read = tokenizer._tokenizer.decode(tokenizer([cut])[0], skip_special_tokens=True)
    whole = " ".join(f"{read} {said}".split()).lower()
    assert whole == " ".join(cut.split()).lower()
    assert capfd.readouterr().err == ""  # nothing of the library's own


def test_what_is_said_of_a_very_long_prompt_stays_short():
    tokenizer = FolderTokenizer(shared_path("assets/clip_tokenizer"), 77)
    (line,) = tokenizer.cuts([ODD[2]])
    assert len(line) < 700
    assert "reads 77 tokens; 648 more of" in line
    assert '..." are cut: "' in line


def test_bytes_that_are_cut_are_said():
    tokenizer = ByteTokenizer(6)
    assert tokenizer.cuts(["abcde", "abcdef", "abcdé"]) == [
        'this model reads 6 tokens; 1 more of "abcdef" are cut: "f"',
        'this model reads 6 tokens; 1 more of "abcdé" are cut: ""',
    ]
    assert WordTokenizer(4).cuts(["a red circle"]) == []


def test_captions_that_are_no_text_do_not_stop_it():
    tokenizer = FolderTokenizer(shared_path("assets/t5_tokenizer"), 8)
    np.testing.assert_array_equal(tokenizer(["caf\udce9"]), tokenizer(["caf?"]))
    assert tokenizer.cuts(["caf\udce9"]) == []


def test_a_hub_that_does_not_answer_is_named():
    with pytest.raises(UserError, match="someone/clip-nowhere is not here, nor as a model of"):
        FolderTokenizer("someone/clip-nowhere", 77)
    for name in ("/no/where", "./nowhere", "a/b/c"):
        with pytest.raises(UserError, match="is neither shapes, bytes nor a folder with a"):
            FolderTokenizer(name, 77)
