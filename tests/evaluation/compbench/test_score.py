"""Scoring: against transformers on the same pictures, resumed, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.evaluation.commands import run
from taca_jax.evaluation.compbench import judges
from taca_jax.evaluation.compbench.folders import picture_name
from taca_jax.evaluation.compbench.phrases import by_rules
from tests.evaluation.weights import change_last_byte
from tests.scorers import originals

PROMPTS = {
    "color": ("a green bench and a red car", 'A red, "b" car (on a green bench).', "a car"),
    "non_spatial": ("a person on a bench", "a red car"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A run in upstream's layout, without our prompts.json; and a category of UniDet's."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for category, prompts in PROMPTS.items():
        (folder / category / "samples").mkdir(parents=True)
        for number in range(2 * len(prompts)):
            pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
            name = picture_name(prompts[number // 2], number)
            Image.fromarray(pixels).save(folder / category / "samples" / name)
    (folder / "spatial").mkdir()
    return folder


def score(folder: Path, scorers: Path, **changes: object) -> None:
    values = {
        "pictures": folder,
        "blip": scorers / "blip",
        "clip": scorers / "clip",
        "phrases": "rules",
        "batch_size": 4,
        **changes,
    }
    run(["compbench", "score", *(f"{key}={value}" for key, value in values.items())])


@pytest.fixture(scope="module")
def scored(tmp_path_factory, pictures, scorers) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "scored"
    shutil.copytree(pictures, folder)
    score(folder, scorers)
    return folder


def answers(folder: Path, category: str, annotation: str) -> list:
    entries = json.loads((folder / category / annotation / "vqa_result.json").read_text())
    assert [each["question_id"] for each in entries] == list(range(2 * len(PROMPTS[category])))
    return [each["answer"] for each in entries]


def samples(folder: Path, category: str) -> list[Path]:
    return sorted((folder / category / "samples").iterdir(), key=lambda path: path.stem[-6:])


def test_clip_score_is_that_of_transformers(scored, sources):
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(sources / "clip").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(sources / "clip")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
    )
    found = answers(scored, "non_spatial", "annotation_clip")
    for path, answer in zip(samples(scored, "non_spatial"), found, strict=True):
        pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
        tokens = tokenizer(path.stem[:-7], return_tensors="pt").input_ids
        with torch.no_grad():
            out = model(input_ids=tokens, pixel_values=pixels)
        assert answer == pytest.approx(float(out.image_embeds[0] @ out.text_embeds[0]), abs=1e-6)


def test_blip_vqa_is_that_of_transformers(scored, sources):
    """The product of p(yes) / (p(yes) + p(no)) over the phrases, rounded as upstream rounds."""
    import torch
    import transformers

    model = transformers.BlipForQuestionAnswering.from_pretrained(sources / "blip").eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(sources / "blip")
    processor = transformers.BlipImageProcessorPil(size={"height": 24, "width": 24})
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    questions = {
        PROMPTS["color"][0]: ["a green bench?", "a red car?"],
        PROMPTS["color"][1]: ["a red, b car?", "a green bench?"],
        PROMPTS["color"][2]: ["a car?"],
    }
    for path, answer in zip(
        samples(scored, "color"), answers(scored, "color", "annotation_blip"), strict=True
    ):
        pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
        product = 1.0
        for question in questions[path.stem[:-7]]:
            tokens = tokenizer(question, return_tensors="pt").input_ids
            tokens[:, 0] = len(originals.WORDS) + 1  # [ENC]
            with torch.no_grad():
                image = model.vision_model(pixels).last_hidden_state
                read = model.text_encoder(input_ids=tokens, encoder_hidden_states=image)[0]
                start = torch.full((1, 1), len(originals.WORDS))  # [DEC]
                logits = model.text_decoder(input_ids=start, encoder_hidden_states=read).logits
            p = torch.softmax(logits[0, 0], 0)
            product *= float(f"{p[yes] / (p[yes] + p[no]):.4f}")
        assert abs(float(answer) - product) <= 1.01e-4
    assert len({*answers(scored, "color", "annotation_blip")}) > 3


def test_phrases_of_the_prompts_here():
    """As the test above has them, punctuation aside."""
    assert by_rules(PROMPTS["color"][1]) == ["A red, b car", "a green bench"]


def test_a_stopped_run_goes_on_where_it_was(tmp_path, pictures, scorers, scored, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(pictures, folder)
    seen = []

    def stopping(self, paths, prompts, scores=judges.BLIPJudge.scores):
        seen.append([path.stem[-6:] for path in paths])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return scores(self, paths, prompts)

    monkeypatch.setattr(judges.BLIPJudge, "scores", stopping)
    with pytest.raises(KeyboardInterrupt):
        score(folder, scorers, clip="none")
    journal = folder / "color" / "annotation_blip" / "scores.jsonl"
    assert not journal.with_name("vqa_result.json").exists()
    with journal.open("a") as file:
        file.write('{"4": "0.5')  # and killed while it wrote
    score(folder, scorers)
    assert seen == [
        ["000000", "000001", "000002", "000003"],
        ["000004", "000005", "000005", "000005"],
        ["000004", "000005", "000005", "000005"],
    ]
    for category, annotation in {"color": "blip", "non_spatial": "clip"}.items():
        name = f"annotation_{annotation}"
        assert answers(folder, category, name) == answers(scored, category, name)
    score(folder, scorers)
    assert len(seen) == 3


def test_a_picture_that_was_replaced_is_scored_anew(tmp_path, scorers, scored, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(scored, folder)
    before, seen = answers(folder, "color", "annotation_blip"), []

    def counted(self, paths, prompts, scores=judges.BLIPJudge.scores):
        seen.append([path.stem[-6:] for path in paths])
        return scores(self, paths, prompts)

    monkeypatch.setattr(judges.BLIPJudge, "scores", counted)
    first, second, *_ = samples(folder, "color")  # of the same prompt
    shutil.copy(second, first)
    score(folder, scorers)
    assert seen == [["000000"] * 4]
    assert before[0] != before[1]
    assert answers(folder, "color", "annotation_blip") == [before[1], *before[1:]]


def test_other_weights_and_phrases_are_refused_before_anything_is_scored(
    tmp_path, pictures, scorers, scored, monkeypatch
):
    monkeypatch.setattr(
        judges.BLIPJudge, "scores", lambda self, paths, prompts: ["0.5000"] * len(paths)
    )
    phrases, folder = tmp_path / "phrases.json", tmp_path / "run"
    shutil.copytree(pictures, folder)
    phrases.write_text(json.dumps({prompt: ["a car"] for prompt in PROMPTS["color"]}))
    blip = tmp_path / "blip"
    shutil.copytree(scorers / "blip", blip)
    score(folder, scorers, clip="none", blip=blip, phrases=phrases)
    moved = phrases.rename(tmp_path / "moved.json")
    score(folder, scorers, clip="none", phrases=moved)  # the same in other places
    moved.write_text(moved.read_text().replace('["a car"]', '["a cat"]'))
    assert "was made with other settings" in refused(folder, scorers, clip="none", phrases=moved)
    change_last_byte(blip / "model.safetensors")
    other = tmp_path / "other"
    shutil.copytree(scored, other)
    assert "was made with other settings" in refused(other, scorers, clip="none", blip=blip)
    # What is not scored yet stays so, if a later category is refused.
    shutil.rmtree(other / "color" / "annotation_blip")
    clip = tmp_path / "clip"
    shutil.copytree(scorers / "clip", clip)
    change_last_byte(clip / "model.safetensors")
    assert "was made with other settings" in refused(other, scorers, clip=clip)
    assert not (other / "color" / "annotation_blip").exists()


def refused(folder: Path, scorers: Path, **changes: object) -> str:
    with pytest.raises(UserError) as error:
        score(folder, scorers, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_scored_is_refused(tmp_path, pictures, scorers, scored):
    assert "was made with other settings" in refused(scored, scorers, dtype="bfloat16")
    assert "has no folder of a category" in refused(tmp_path, scorers)
    blip, clip = scorers / "blip", scorers / "clip"
    assert "is of kind blip_vqa; expected clip_score" in refused(pictures, scorers, clip=blip)
    assert "is no model folder" in refused(pictures, scorers, blip=tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(clip, bare)
    shutil.rmtree(bare / "tokenizer")
    assert "has no tokenizer; copy its files" in refused(pictures, scorers, clip=bare)
    (tmp_path / "phrases.json").write_text(json.dumps({PROMPTS["color"][0]: ["a green bench"]}))
    said = refused(pictures, scorers, phrases=tmp_path / "phrases.json")
    assert "finds none in 'A red" in said
    assert not list(pictures.glob("*/annotation*"))

    damaged = tmp_path / "damaged"
    shutil.copytree(scored, damaged)
    with (damaged / "color" / "annotation_blip" / "scores.jsonl").open("a") as file:
        file.write('{"0": 0.5}\n')
    assert "scores.jsonl is damaged; remove its folder" in refused(damaged, scorers)
    shutil.rmtree(damaged)
    shutil.copytree(pictures, damaged)
    first = samples(damaged, "color")[0]
    first.write_bytes(first.read_bytes()[:200])
    assert "cannot be read" in refused(damaged, scorers)
    shutil.rmtree(damaged / "color" / "samples")
    assert "color has no pictures; draw them" in refused(damaged, scorers)


def test_results_of_another_program_are_left_alone(tmp_path, pictures, scorers, capsys):
    folder = tmp_path / "run"
    shutil.copytree(pictures, folder)
    theirs = folder / "color" / "annotation_blip" / "vqa_result.json"
    theirs.parent.mkdir()
    theirs.write_text('[{"question_id": 0, "answer": "0.5000"}]')
    score(folder, scorers, clip="none")
    said = capsys.readouterr().out
    assert "is of another program, and is left as it is" in said
    assert "spatial: no UniDet yet" in said
    assert theirs.read_text() == '[{"question_id": 0, "answer": "0.5000"}]'
