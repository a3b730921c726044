"""Prompts to embeddings as FLUX and Stable Diffusion 3 read them, against diffusers.

Small random text encoders with the whole vocabularies of the real tokenizers; the folders that
transformers writes go through `python -m convert` and the loaders of pipelines.
"""

import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.convert.cli import main
from taca_jax.errors import UserError
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.families.flux.text import FluxText
from taca_jax.families.sd3.diffusers import SCHEDULE
from taca_jax.families.sd3.text import SD3Text
from taca_jax.pipelines.text import encoders_by_folder, load_text, save_tokenizers
from taca_jax.text.tokenizers import load_tokenizer
from taca_jax.weights.folders import save_model
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import PipelineSettings, converted_pipeline
from tests.compare import relative_error
from tests.models import SD3
from tests.random_models import random_model
from tests.shared import shared_path

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = [
    "a red circle left of a blue square",
    "",
    "Кошка и 🐈‍⬛ on a naïve café's roof",
    "a street with many red and blue houses, " * 30,  # 300 tokens: more than 77 and 256
]
CLIP_TOKENS, SD3_T5_TOKENS, SD3_WIDTH, SD3_POOLED = 77, 256, 64, 16 + 24


def perturbed(model, seed: int):
    """With random numbers of a size that matters in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator))
    return model.eval()


def clip(
    kind: str,
    dim: int,
    *,
    activation: str = "quick_gelu",
    seed: int = 0,
    hidden: int | None = None,
):
    """A CLIP `hidden` wide, by default as wide as what it projects to, which is `dim`."""
    torch.manual_seed(seed)
    hidden = dim if hidden is None else hidden
    settings = transformers.CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=dim,
        hidden_act=activation,
        eos_token_id=2,  # as in the released configs
    )
    return perturbed(getattr(transformers, kind)(settings), seed)


def t5(dim: int):
    torch.manual_seed(3)
    settings = transformers.T5Config(
        vocab_size=32128,
        d_model=dim,
        d_kv=8,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return perturbed(transformers.T5EncoderModel(settings), 3)


def clip_tokenizer(pad: str = "<|endoftext|>"):
    return transformers.CLIPTokenizer.from_pretrained(
        str(shared_path("assets/clip_tokenizer")), model_max_length=CLIP_TOKENS, pad_token=pad
    )


def t5_tokenizer():
    file = shared_path("assets/t5_tokenizer/tokenizer.json")
    return transformers.T5TokenizerFast(tokenizer_file=str(file), model_max_length=512)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """diffusers' pipeline, and ours of the same text encoders beside the golden transformer."""
    root = tmp_path_factory.mktemp("flux")
    golden = shared_path("golden/flux")
    settings = json.loads((golden / "transformer" / "config.json").read_text())
    theirs = diffusers.FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=clip("CLIPTextModel", settings["pooled_projection_dim"]),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(settings["joint_attention_dim"]),
        tokenizer_2=t5_tokenizer(),
        transformer=None,
    )
    for part in ("transformer", "scheduler"):
        shutil.copytree(golden / part, root / "src" / part)
    for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        getattr(theirs, part).save_pretrained(root / "src" / part)
    main(["flux", "--src", str(root / "src"), "--dst", str(root / "dst")])
    return theirs, FluxPipeline.from_pretrained(root / "dst", dtype="float32"), root / "dst"


def test_flux_prompts_are_encoded_as_diffusers_does(flux):
    theirs, ours, _ = flux
    with torch.no_grad():
        txt, pooled, _ = theirs.encode_prompt(PROMPTS, None, device="cpu")
    text = ours.encode_prompts(PROMPTS)
    assert text.txt.shape == (len(PROMPTS), 512, txt.shape[-1])
    assert relative_error(text.txt, txt) <= 1e-5
    assert relative_error(text.pooled, pooled) <= 1e-5


def test_only_what_is_cut_is_announced(flux, caplog):
    _, ours, folder = flux
    with caplog.at_level(logging.WARNING, "taca_jax"):
        ours.encode_prompts(PROMPTS)
    (line,) = [record.getMessage() for record in caplog.records]  # CLIP's; T5 reads it all
    assert f"{folder / 'tokenizer'} reads 77 tokens" in line
    assert 'more of "a street with many red and blue houses, ' in line


def test_a_saved_flux_pipeline_brings_both_encoders_and_tokenizers(flux, tmp_path):
    _, ours, _ = flux
    ours.save(tmp_path / "saved")
    for number in ("", "_2"):
        assert (tmp_path / "saved" / f"text_encoder{number}").is_dir()
        assert (tmp_path / "saved" / f"tokenizer{number}").is_dir()
    again = FluxPipeline.from_pretrained(tmp_path / "saved", dtype="float32")
    assert isinstance(again.text_encoder, FluxText)
    np.testing.assert_array_equal(again.tokenizer(PROMPTS), ours.tokenizer(PROMPTS))
    one, other = again.encode_prompts(PROMPTS), ours.encode_prompts(PROMPTS)
    np.testing.assert_array_equal(one.txt, other.txt)
    np.testing.assert_array_equal(one.pooled, other.pooled)


def test_a_flux_folder_without_one_of_its_parts(flux, tmp_path):
    """Without CLIP or T5 embeddings can be given; without a tokenizer nothing can be read."""
    *_, folder = flux
    for part in ("text_encoder", "text_encoder_2"):
        copy = tmp_path / part
        shutil.copytree(folder, copy)
        shutil.rmtree(copy / part)
        pipeline = FluxPipeline.from_pretrained(copy, dtype="float32")
        with pytest.raises(UserError, match=r"lacks a text encoder .*CLIP and T5"):
            pipeline.encode_prompts(["a circle"])
    copy = tmp_path / "untokenized"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(
        UserError, match=r"tokenizer is not there; it is the tokenizer of text_encoder"
    ):
        FluxPipeline.from_pretrained(copy)


def test_text_encoders_that_do_not_belong_to_the_transformer(flux, tmp_path):
    *_, folder = flux
    shutil.copytree(folder, tmp_path / "copy")
    part = tmp_path / "copy" / "text_encoder"
    shutil.copytree(part, tmp_path / "copy" / "text_encoder_3")
    with pytest.raises(UserError, match=r"2 CLIP encoders \(text_encoder, text_encoder_3\)"):
        FluxPipeline.from_pretrained(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "text_encoder_3")
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | {"dim": 6}))
    with pytest.raises(UserError, match="text_encoder is 6 wide, the transformer reads"):
        FluxPipeline.from_pretrained(tmp_path / "copy")
    shutil.rmtree(part)
    shutil.copytree(tmp_path / "copy" / "transformer", part)
    with pytest.raises(UserError, match="text_encoder holds no text encoder but a FluxConfig"):
        FluxPipeline.from_pretrained(tmp_path / "copy")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """diffusers' pipeline, and a folder of the same text encoders, each converted."""
    root = tmp_path_factory.mktemp("sd3")
    theirs = diffusers.StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=clip("CLIPTextModelWithProjection", 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip("CLIPTextModelWithProjection", 24, activation="gelu", seed=1),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5(SD3_WIDTH),
        tokenizer_3=t5_tokenizer(),
    )
    for number, kind in (("", "clip"), ("_2", "clip"), ("_3", "t5")):
        encoder, src = f"text_encoder{number}", root / "src" / f"text_encoder{number}"
        getattr(theirs, encoder).save_pretrained(src)
        main([kind, "--src", str(src), "--dst", str(root / "dst" / encoder)])
        tokenizer = f"tokenizer{number}"
        getattr(theirs, tokenizer).save_pretrained(root / "dst" / tokenizer)
    config = replace(SD3, txt_dim=SD3_WIDTH, pooled_dim=SD3_POOLED)
    save_model(root / "dst" / "transformer", random_model(config))
    return theirs, root / "dst"


def load_sd3(folder):
    """What reads SD3's prompts, and its tokenizer; None where a CLIP is missing."""
    settings = PipelineSettings(
        tokenizer=None,
        text_length=SD3_T5_TOKENS,
        resolution=64,
        steps=4,
        guidance=1.0,
        schedule=SCHEDULE,
    )
    stored = converted_pipeline(folder, settings)
    reading = stored.reading
    return None if reading is None else load_text(stored, reading, LoadOptions(dtype=jnp.float32))


@pytest.fixture(scope="module")
def sd3_text(sd3):
    """What reads SD3's prompts with all three encoders."""
    return load_sd3(sd3[1])


@nnx.jit
def run(encoder: SD3Text, tokens):
    return encoder(tokens)


@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3_prompts_are_encoded_as_diffusers_does(sd3, sd3_text, tmp_path, with_t5):
    theirs, folder = sd3
    encoder, tokenizer = sd3_text
    if not with_t5:
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / "text_encoder_3")
        encoder, tokenizer = load_sd3(tmp_path / "copy")
        theirs = diffusers.StableDiffusion3Pipeline(
            **theirs.components | {"text_encoder_3": None, "tokenizer_3": None}
        )
        # From it diffusers takes the width of the zeros.
        theirs.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=SD3_WIDTH))
    with torch.no_grad():
        txt, negative_txt, pooled, negative_pooled = theirs.encode_prompt(
            PROMPTS, None, None, device="cpu", negative_prompt=["low quality"] * len(PROMPTS)
        )
    text = run(encoder, tokenizer(PROMPTS))
    assert text.txt.shape == (len(PROMPTS), CLIP_TOKENS + SD3_T5_TOKENS, SD3_WIDTH)
    assert relative_error(text.txt, txt) <= 1e-5
    assert relative_error(text.pooled, pooled) <= 1e-5
    negative = run(encoder, tokenizer(["low quality"] * len(PROMPTS)))
    assert relative_error(negative.txt, negative_txt) <= 1e-5
    assert relative_error(negative.pooled, negative_pooled) <= 1e-5
    # What of each prompt is cut: 77 tokens twice, and T5's 256.
    lengths = [line.split(" reads ")[1].split()[0] for line in tokenizer.cuts(PROMPTS)]
    assert lengths == ["77", "77", "256"][: 3 if with_t5 else 2]


def test_sd3_encoders_and_tokenizers_by_folder(sd3, sd3_text, tmp_path):
    _, folder = sd3
    encoder, tokenizer = sd3_text
    parts = encoders_by_folder(encoder)
    assert list(parts) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert parts["text_encoder_2"].config.activation == "gelu"
    assert save_tokenizers(tmp_path, tokenizer)
    for number, pad in (("", 49407), ("_2", 0), ("_3", 0)):
        again = load_tokenizer(str(tmp_path / f"tokenizer{number}"), 77)
        assert again.pad_id == pad
    for part in ("transformer", "text_encoder"):
        shutil.copytree(folder / part, tmp_path / part)
    assert load_sd3(tmp_path) is None
