"""Models that take turns in memory draw the same pictures, and never meet there."""

import dataclasses
import weakref

import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import TacaConfig
from taca_jax.weights.lora_files import write_lora
from taca_jax.weights.pipeline_folders import StoredModel
from tests.models import TINY_VAE
from tests.random_models import random_model, randomise
from tests.training.tiny import FLUX, tiny_pipeline

PROMPT = "a red circle and a blue square"
TACA = TacaConfig(gamma=2.0, threshold=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline with a decoder that has parameters."""
    pipeline = tiny_pipeline(dataclasses.replace(FLUX, latent_channels=4, patch_size=2))
    pipeline.autoencoder = random_model(TINY_VAE)
    path = tmp_path_factory.mktemp("pipelines") / "p"
    pipeline.save(path)
    return path


@pytest.fixture(scope="module")
def resident(folder):
    return Pipeline.from_pretrained(folder, "float32")


@pytest.fixture(scope="module")
def lora_file(folder, tmp_path_factory):
    other = Pipeline.from_pretrained(folder, "float32")
    add_lora(other.transformer, LoRAConfig(rank=2, alpha=4), ATTENTION_TARGETS, rngs=nnx.Rngs(3))
    randomise(other.transformer, LoRAParam, scale=0.2)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_lora(path, other.transformer)
    return path


@pytest.fixture
def read(monkeypatch):
    """The kinds of the models that are read, in order; fails if one is while another is alive."""
    kinds, alive = [], weakref.WeakSet()
    original = StoredModel.__init__

    def init(self, where, config, load, check):
        def counted(options):
            others = [type(each).__name__ for each in alive]
            assert not others, f"{others} in memory when {where} is read"
            model = load(options)
            kinds.append(type(config).__name__.removesuffix("Config"))
            alive.add(model)
            return model

        original(self, where, config, counted, check)

    monkeypatch.setattr(StoredModel, "__init__", init)
    return kinds


def array(pipeline, prompt=PROMPT, **options):
    return pipeline(prompt, output="array", **options).images


def test_each_model_is_read_when_it_is_needed_and_alone(folder, resident, read):
    staged = Pipeline.from_pretrained(folder, "float32", stages=True)
    assert staged.staged
    assert not resident.staged
    assert np.array_equal(staged.timesteps(), resident.timesteps())
    assert np.array_equal(staged.noise(2), resident.noise(2))
    assert read == []
    options = {"taca": TACA, "guidance": 2.0, "num_images": 2}
    expected = array(resident, negative_prompt="a green circle", **options)
    drawn = array(staged, negative_prompt="a green circle", **options)
    assert np.array_equal(drawn, expected)
    assert read == ["T5", "Flux", "TinyVAE"]
    text = staged.embeds(PROMPT, guidance=2.0)
    latents = [staged(**text, **options, seed=i, output="latents").latents for i in (0, 5)]
    assert read[3:] == ["T5", "Flux"]
    assert np.array_equal(staged.decode(latents[0], output="array"), array(resident, **options))
    assert read[5:] == ["TinyVAE"]


def test_a_lora_comes_back_with_its_transformer(folder, resident, lora_file, read):
    staged = Pipeline.from_pretrained(folder, "float32", stages=True)
    assert "LoRA of" in staged.load_lora(lora_file)
    assert read == []  # only shapes are compared
    resident.load_lora(lora_file)
    try:
        expected = array(resident, taca=TACA)
    finally:
        resident.unload_lora()
    for _ in range(2):
        assert np.array_equal(array(staged, taca=TACA), expected)
    plain = array(resident, taca=TACA)
    assert np.abs(plain - expected).max() > 1e-3
    staged.unload_lora()
    assert np.array_equal(array(staged, taca=TACA), plain)
    staged(PROMPT, output="latents")
    staged.load_lora(lora_file)  # now it is the transformer's turn
    assert np.array_equal(array(staged, taca=TACA), expected)


def test_a_lora_of_another_model_is_refused_before_anything_is_read(folder, tmp_path, read):
    wide = tiny_pipeline(dataclasses.replace(FLUX, num_heads=4))
    add_lora(wide.transformer, LoRAConfig(rank=2), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    write_lora(tmp_path / "lora.safetensors", wide.transformer)
    staged = Pipeline.from_pretrained(folder, "float32", stages=True)
    with pytest.raises(UserError, match="is a LoRA of another model"):
        staged.load_lora(tmp_path / "lora.safetensors")
    assert read == []


def test_a_prompt_that_cannot_be_read_is_refused_before_anything_is(folder, read):
    staged = Pipeline.from_pretrained(folder, "float32", stages=True)
    with pytest.raises(UserError, match="the word 'dog' is unknown"):
        staged("a red dog")
    assert read == []


def test_a_saved_pipeline_in_stages_is_the_same(folder, resident, tmp_path, read):
    Pipeline.from_pretrained(folder, "float32", stages=True).save(tmp_path / "again")
    assert read == ["Flux", "T5", "TinyVAE"]
    again = Pipeline.from_pretrained(tmp_path / "again", "float32", stages=True)
    assert np.array_equal(array(again), array(resident))


def test_previews_are_drawn_by_an_autoencoder_of_its_own(folder, resident):
    staged = Pipeline.from_pretrained(folder, "float32", stages=True)
    seen = {}
    for pipeline in (resident, staged):
        seen[pipeline] = []
        pipeline(PROMPT, preview=lambda _, pictures, seen=seen[pipeline]: seen.extend(pictures))
    assert len(seen[staged]) == len(seen[resident]) == 3
    for one, other in zip(seen[staged], seen[resident], strict=True):
        assert np.array_equal(one, other)


def test_what_a_pipeline_lacks_is_said_in_stages_too(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.autoencoder = None
    pipeline.save(tmp_path / "p")
    staged = Pipeline.from_pretrained(tmp_path / "p", "float32", stages=True)
    with pytest.raises(UserError, match='no autoencoder; ask for output="latents"'):
        staged(PROMPT)
    assert staged.autoencoder is None
    assert staged(PROMPT, height=64, width=64, output="latents").latents.shape == (1, 8, 8, 3)
