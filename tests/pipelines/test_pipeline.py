"""Pipelines: the same input gives the same picture, and what does not fit is refused."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from taca_jax.attention import api
from taca_jax.autoencoders.pixels import Pixels, PixelsConfig
from taca_jax.autoencoders.tiling import TILING, Tiling, decode_in_tiles
from taca_jax.autoencoders.tiny_vae import TinyVAE
from taca_jax.errors import UserError
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora, linears
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.pipelines.decoding import decode
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import TacaConfig
from taca_jax.weights.folders import save_model
from taca_jax.weights.lora_files import write_lora
from tests.models import TINY_VAE
from tests.random_models import random_model, randomise
from tests.shared import shared_path
from tests.training.tiny import FLUX, tiny_pipeline

PROMPT = "a red circle and a blue square"
TACA = TacaConfig(gamma=2.0, threshold=500)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def array(pipeline, prompt=PROMPT, **options):
    return pipeline(prompt, output="array", **options).images


@pytest.fixture(scope="module")
def image(pipeline):
    return array(pipeline)


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    other = tiny_pipeline()
    add_lora(other.transformer, LoRAConfig(rank=2, alpha=4), ATTENTION_TARGETS, rngs=nnx.Rngs(3))
    randomise(other.transformer, LoRAParam, scale=0.2)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    write_lora(path, other.transformer, gate="taca")
    return path


def test_pictures_are_in_the_range_and_of_the_size(image):
    assert image.shape == (1, 40, 40, 3)
    assert image.dtype == np.float32
    assert image.min() >= 0
    assert image.max() <= 1
    assert image.std() > 0.01


def test_a_saved_pipeline_draws_the_same(pipeline, image, tmp_path):
    pipeline.save(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model", "float32")
    assert loaded.settings == pipeline.settings
    assert np.array_equal(array(loaded), image)


def test_bfloat16_draws_nearly_the_same(pipeline, image, tmp_path):
    pipeline.save(tmp_path, dtype="bfloat16")
    loaded = Pipeline.from_pretrained(tmp_path)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(loaded.transformer))} == {
        jnp.dtype("bfloat16")
    }
    half = array(loaded)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - image).mean() < 0.02


def test_the_same_call_gives_the_same_picture(pipeline, image):
    assert np.array_equal(array(pipeline), image)
    assert np.array_equal(array(pipeline, seed=0, steps=3, height=40, width=40), image)


def test_the_second_picture_with_taca_and_lora_is_right_too(pipeline, image, lora_file):
    assert "LoRA of" in pipeline.load_lora(lora_file)
    first = array(pipeline, taca=TACA)
    plain = array(pipeline)
    second = array(pipeline, taca=TACA)
    alone = array(pipeline, taca=dataclasses.replace(TACA, gamma=1.0))
    without = array(pipeline, taca=TACA, lora_strength=0.0)
    pipeline.load_lora(lora_file)
    reloaded = array(pipeline, taca=TACA)
    pipeline.unload_lora()
    assert np.array_equal(first, second)
    assert np.array_equal(first, reloaded)
    pictures = [image, first, alone, without]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert np.abs(one - other).max() > 1e-3
    np.testing.assert_allclose(plain, image, atol=1e-5)  # without TACA the LoRA is off
    np.testing.assert_allclose(array(pipeline, taca=TACA), without, atol=1e-5)
    assert np.array_equal(array(pipeline), image)
    pipeline.unload_lora()  # there is none any more


def test_saving_leaves_the_lora_out(pipeline, image, lora_file, tmp_path):
    pipeline.load_lora(lora_file)
    pipeline.save(tmp_path / "model")
    pipeline.unload_lora()
    loaded = Pipeline.from_pretrained(tmp_path / "model", "float32")
    assert all(layer.lora_a is None for _, layer in linears(loaded.transformer))
    assert np.array_equal(array(loaded), image)


def test_seeds_and_prompts_differ(pipeline, image):
    assert np.abs(array(pipeline, seed=1) - image).max() > 0.1
    assert np.abs(array(pipeline, "three cyan triangles") - image).max() > 1e-3


def test_picture_i_of_a_batch_is_that_of_seed_plus_i(pipeline):
    several = array(pipeline, num_images=3, seed=5)
    assert several.shape == (3, 40, 40, 3)
    for i in range(3):
        np.testing.assert_allclose(several[i], array(pipeline, seed=5 + i)[0], atol=1e-5)
    chosen = array(pipeline, num_images=3, seed=[7, 5, 7])
    assert np.array_equal(chosen[0], array(pipeline, num_images=3, seed=[7, 6, 5])[0])
    np.testing.assert_allclose(chosen, several[[2, 0, 2]], atol=1e-5)


def test_lists_of_prompts_each_give_their_pictures(pipeline):
    prompts = [PROMPT, "three cyan triangles"]
    several = array(pipeline, prompts, num_images=2)
    assert several.shape == (4, 40, 40, 3)
    for i, prompt in enumerate([prompts[0], prompts[0], prompts[1], prompts[1]]):
        np.testing.assert_allclose(several[i], array(pipeline, prompt, seed=i)[0], atol=1e-5)


def test_embeddings_stand_in_for_a_prompt(pipeline, image):
    text = pipeline.encode_prompts([PROMPT])
    given = {"prompt_embeds": text.txt, "pooled_prompt_embeds": text.pooled}
    assert np.array_equal(array(pipeline, None, **given), image)
    bare = Pipeline(
        pipeline.transformer,
        text_encoder=None,
        tokenizer=None,
        autoencoder=pipeline.autoencoder,
        settings=pipeline.settings,
    )
    assert np.array_equal(array(bare, None, **given), image)
    with pytest.raises(UserError, match=r"lacks a text encoder .*give prompt_embeds and pooled"):
        bare(PROMPT)


def test_latents_stand_in_for_the_seed(pipeline, image):
    noise = jax.random.normal(jax.random.key(0), (40, 40, 3))[None]
    assert np.array_equal(array(pipeline, latents=noise, seed=7), image)
    wide = pipeline(PROMPT, latents=jnp.zeros((1, 40, 80, 3)))
    assert wide.images[0].size == (80, 40)


def test_the_outputs_show_the_same_picture(pipeline, image):
    pictures = pipeline(PROMPT, output="pil")
    assert [type(picture) for picture in pictures.images] == [Image.Image]
    assert np.array_equal(np.asarray(pictures.images[0]), np.round(image[0] * 255))
    latents = pipeline(PROMPT, output="latents")
    assert latents.images is None
    assert np.array_equal(latents.latents, pictures.latents)
    np.testing.assert_allclose(np.clip((latents.latents + 1) / 2, 0, 1), image, atol=1e-6)


def test_height_and_width_are_pixels(pipeline):
    assert array(pipeline, height=24, width=64).shape == (1, 24, 64, 3)


def test_a_callback_sees_every_step_and_changes_nothing(pipeline):
    seen = []
    stepped = pipeline(
        PROMPT,
        taca=TACA,
        trajectory=True,
        callback=lambda step, latents: seen.append((step, np.asarray(latents))),
    )
    whole = pipeline(PROMPT, taca=TACA, trajectory=True)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert np.array_equal(stepped.latents, whole.latents)
    for name in ("latents", "x0"):
        one, other = getattr(stepped.trajectory, name), getattr(whole.trajectory, name)
        assert one.shape == other.shape == (3, 1, 40, 40, 3)
        np.testing.assert_allclose(one, other, atol=1e-5)
    for (_, latents), expected in zip(seen, whole.trajectory.latents, strict=True):
        np.testing.assert_allclose(latents, expected, atol=1e-5)
    assert pipeline(PROMPT).trajectory is None


def test_previews_are_what_the_picture_is_predicted_to_become(pipeline, image):
    seen = []
    drawn = pipeline(
        PROMPT,
        num_images=2,
        output="array",
        trajectory=True,
        preview=lambda step, pictures: seen.append((step, pictures)),
    )
    np.testing.assert_allclose(drawn.images[:1], image, atol=1e-5)
    assert [step for step, _ in seen] == [0, 1, 2]
    for (_, pictures), x0 in zip(seen, drawn.trajectory.x0, strict=True):
        expected = np.round(np.clip((np.asarray(x0) + 1) / 2, 0, 1) * 255)
        assert [type(picture) for picture in pictures] == [Image.Image] * 2
        assert np.abs(np.stack(pictures) - expected).max() <= 1
    assert np.array_equal(np.asarray(seen[-1][1][0]), np.round(drawn.images[0] * 255))


def test_a_previewer_is_a_tiny_autoencoder_of_these_latents(tmp_path):
    pipeline = tiny_pipeline(dataclasses.replace(FLUX, latent_channels=16))
    pipeline.autoencoder = None
    with pytest.raises(UserError, match=r"by a tiny autoencoder \(TAEF1 .* load_previewer\(PATH\)"):
        pipeline(PROMPT, output="latents", preview=lambda step, pictures: None)
    taef1 = shared_path("assets/tae") / "taef1"
    pipeline.load_previewer(taef1)
    save_model(tmp_path / "converted", pipeline.previewer)
    loaded = pipeline.previewer
    pipeline.load_previewer(tmp_path / "converted")
    for one, other in zip(
        *(jax.tree.leaves(nnx.state(each)) for each in (loaded, pipeline.previewer)), strict=True
    ):
        assert np.array_equal(one, other)
    with pytest.raises(UserError, match="has 16 latent channels, the transformer expects 3"):
        tiny_pipeline().load_previewer(taef1)
    save_model(tmp_path / "pixels", Pixels())
    with pytest.raises(UserError, match="is of a pixels; previews take a tiny_vae"):
        pipeline.load_previewer(tmp_path / "pixels")


def test_a_bar_shows_where_it_is_asked_for(pipeline, image, capfd):
    assert np.array_equal(array(pipeline), image)
    assert capfd.readouterr().err == ""  # no terminal
    assert np.array_equal(array(pipeline, progress=True), image)
    assert "steps" in capfd.readouterr().err


def test_guidance_is_against_the_negative_prompt(pipeline, image):
    np.testing.assert_allclose(array(pipeline, guidance=1.0), image, atol=1e-6)
    guided = array(pipeline, guidance=4.0)
    assert np.abs(guided - image).max() > 1e-3
    assert np.array_equal(array(pipeline, guidance=4.0, negative_prompt=""), guided)
    against = array(pipeline, guidance=4.0, negative_prompt="three cyan triangles")
    assert np.abs(against - guided).max() > 1e-3
    text = pipeline.encode_prompts(["three cyan triangles"])
    given = {"negative_prompt_embeds": text.txt, "negative_pooled_prompt_embeds": text.pooled}
    assert np.array_equal(array(pipeline, guidance=4.0, **given), against)
    same = array(pipeline, guidance=4.0, negative_prompt=PROMPT)
    np.testing.assert_allclose(same, image, atol=1e-4)  # v + 4 (v - v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "give either prompt, or prompt_embeds with pooled_prompt_embeds"),
        ({"prompt_embeds": jnp.zeros((1, 16, 32))}, "give either prompt, or prompt_embeds with"),
        (
            {"prompt_embeds": jnp.zeros((1, 16, 32)), "pooled_prompt_embeds": jnp.zeros((1, 32))},
            "give either prompt, or prompt_embeds with",
        ),
        ({"prompt": []}, "prompt is an empty list; give one or more"),
        (
            {
                "prompt": None,
                "prompt_embeds": jnp.zeros((2, 16, 32)),
                "pooled_prompt_embeds": jnp.zeros((1, 32)),
            },
            r"prompt_embeds are \(2, 16, 32\) and pooled \(1, 32\); expected \(b, tokens, 32\)",
        ),
        ({"output": "jpeg"}, "output is 'jpeg'; it must be one of pil, array, latents"),
        ({"seed": 2**31}, "seed is 2147483648; it must be 0 to"),
        ({"seed": [3, -1]}, r"seed is \[3, -1\]; it must be 0 to"),
        ({"seed": [3, 1]}, "2 seeds for 1 pictures; give one for each"),
        ({"height": 42}, "42 x 40 pixels: both must be multiples of 4"),
        ({"width": 39}, "40 x 39 pixels: both must be multiples of 4"),
        ({"latents": jnp.zeros((2, 40, 40, 3))}, r"latents are \(2, 40, 40, 3\); expected 1 of 3"),
        ({"latents": jnp.zeros((1, 40, 40, 4))}, r"latents are \(1, 40, 40, 4\); expected 1 of 3"),
        ({"prompt": "a red dog"}, "the word 'dog' is unknown to this model; it knows: "),
        ({"prompt": " ".join(["red"] * 16)}, "takes 17 tokens; this model reads 16"),
        ({"steps": -1}, "steps is -1; sampling takes 1 or more"),
        ({"steps": 0}, "steps is 0; sampling takes 1 or more"),
        ({"height": 0}, "0 x 40 pixels: both must be multiples of 4"),
        ({"num_images": 0}, "num_images is 0; it must be 1 or more"),
        ({"latents": jnp.zeros((1, 42, 40, 3))}, "height and width multiples of 4"),
        ({"latents": jnp.zeros((40, 40, 3))}, r"latents are \(40, 40, 3\); expected 1 of 3"),
        ({"negative_prompt": "a circle"}, "a negative prompt acts with guidance above 1; it is 1"),
        (
            {"guidance": 2.0, "negative_prompt_embeds": jnp.zeros((1, 16, 32))},
            "negative_prompt_embeds with negative_pooled_prompt_embeds",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused_in_one_line(pipeline, options, message):
    with pytest.raises(UserError, match=message) as refusal:
        pipeline(**({"prompt": PROMPT} | options))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("callback", [None, lambda step, latents: None])
def test_a_pipeline_on_a_mesh_draws_the_same(pipeline, image, tmp_path, callback):
    pipeline.save(tmp_path / "p")
    mesh = make_mesh(MeshConfig())
    meshed = Pipeline.from_pretrained(tmp_path / "p", "float32", mesh=mesh)
    kernel = meshed.transformer.double_blocks.img.qkv.q.kernel.get_value()
    assert kernel.sharding.mesh.axis_names == mesh.axis_names
    np.testing.assert_allclose(array(meshed, callback=callback), image, atol=1e-5)


def test_without_an_autoencoder_there_are_latents_only(pipeline):
    bare = Pipeline(
        pipeline.transformer,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        autoencoder=None,
        settings=pipeline.settings,
    )
    noise = jnp.zeros((1, 40, 40, 3))
    with pytest.raises(UserError, match='no autoencoder; ask for output="latents"'):
        bare(PROMPT, latents=noise)
    assert bare(PROMPT, latents=noise, output="latents").latents.shape == (1, 40, 40, 3)


def test_an_autoencoder_decodes_and_is_saved_with_the_rest(tmp_path):
    pipeline = tiny_pipeline(dataclasses.replace(FLUX, latent_channels=4, patch_size=2))
    pipeline.autoencoder = random_model(TINY_VAE)
    drawn = pipeline(PROMPT, output="array")
    assert drawn.latents.shape == (1, 20, 20, 4)
    assert drawn.images.shape == (1, 40, 40, 3)
    pipeline.save(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model", "float32")
    assert isinstance(loaded.autoencoder, TinyVAE)
    assert np.array_equal(array(loaded), drawn.images)


def test_large_pictures_are_decoded_in_squares_where_asked(pipeline, monkeypatch):
    seen = []

    def in_tiles(decode, latents, tiling, downscale):
        seen.append((tiling, latents.shape))
        return decode_in_tiles(decode, latents, tiling, downscale)

    monkeypatch.setattr("taca_jax.pipelines.decoding.decode_in_tiles", in_tiles)
    # Half of the overlap is most of what a position of this decoder sees.
    small, tiling = random_model(TINY_VAE), Tiling(above=48, size=48, overlap=24)
    latents = jax.random.normal(jax.random.key(0), (2, 32, 24, 4))
    at_once = decode(small, latents, TILING)
    np.testing.assert_allclose(decode(small, latents, tiling), at_once, atol=5e-3)
    decode(small, latents[:, :24], tiling)
    assert seen == [(tiling, latents.shape)]
    with pytest.raises(UserError, match="takes multiples of 2 pixels"):
        decode(small, latents, Tiling(above=0, size=23, overlap=0))
    # What a call says reaches the decoder; pixels need none of it.
    given = []
    monkeypatch.setattr(
        "taca_jax.pipelines.pipeline.decode", lambda *args: given.append(args[2]) or decode(*args)
    )
    for options in ({}, {"tiling": None}, {"tiling": Tiling(above=0, size=24, overlap=0)}):
        array(pipeline, **options)
    assert given == [TILING, None, Tiling(above=0, size=24, overlap=0)]
    assert len(seen) == 2


def test_pixels_are_normalised_as_the_folder_says(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.autoencoder = Pixels(PixelsConfig(shift_factor=0.25, scaling_factor=2.0))
    drawn = pipeline(PROMPT, output="array")
    expected = np.clip((drawn.latents / 2.0 + 0.25 + 1) / 2, 0, 1)
    np.testing.assert_allclose(drawn.images, expected, atol=1e-6)
    pipeline.save(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model", "float32")
    assert loaded.autoencoder.config == pipeline.autoencoder.config
    assert np.array_equal(array(loaded), drawn.images)
    shutil.rmtree(tmp_path / "model" / "autoencoder")
    assert Pipeline.from_pretrained(tmp_path / "model").autoencoder is None


def test_missing_folders_and_parts_are_named(pipeline, tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not there"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    pipeline.save(tmp_path / "model")
    (tmp_path / "model" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"text_encoder has no model\.safetensors; write"):
        Pipeline.from_pretrained(tmp_path / "model")
    for file in (tmp_path / "model" / "text_encoder").iterdir():
        file.unlink()
    (tmp_path / "model" / "text_encoder").rmdir()
    partial = Pipeline.from_pretrained(tmp_path / "model")
    assert partial.text_encoder is None
    assert isinstance(partial.autoencoder, Pixels)
    (tmp_path / "model" / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match="transformer is no model folder"):
        Pipeline.from_pretrained(tmp_path / "model")


def test_a_damaged_pipeline_file_is_named(pipeline, tmp_path):
    pipeline.save(tmp_path)
    (tmp_path / "pipeline.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        Pipeline.from_pretrained(tmp_path)


def test_a_lora_of_another_model_is_refused(pipeline, lora_file, tmp_path):
    wide = dataclasses.replace(FLUX, num_heads=4)
    other = tiny_pipeline(wide)
    add_lora(other.transformer, LoRAConfig(rank=2), ATTENTION_TARGETS, rngs=nnx.Rngs(0))
    randomise(other.transformer, LoRAParam, scale=0.2)
    write_lora(tmp_path / "lora.safetensors", other.transformer)
    pipeline.load_lora(lora_file)
    adapted = array(pipeline, taca=TACA)
    with pytest.raises(UserError, match="is a LoRA of another model"):
        pipeline.load_lora(tmp_path / "lora.safetensors")
    assert np.array_equal(array(pipeline, taca=TACA), adapted)  # that of before is still on
    pipeline.unload_lora()
    with pytest.raises(UserError, match="is not there"):
        pipeline.load_lora(tmp_path / "nothing.safetensors")


def test_a_save_that_fails_leaves_the_folder_as_it_was(pipeline, image, tmp_path, monkeypatch):
    pipeline.save(tmp_path / "p")
    before = {p: p.read_bytes() for p in (tmp_path / "p").rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("taca_jax.pipelines.models.save_tokenizers", full)
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\)"):
        pipeline.save(tmp_path / "p")
    assert {p: p.read_bytes() for p in (tmp_path / "p").rglob("*") if p.is_file()} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(UserError, match="exists and is no pipeline folder; save elsewhere"):
        pipeline.save(tmp_path / "notes")


def test_the_implementation_asked_for_reaches_attention(pipeline, tmp_path, monkeypatch):
    pipeline.save(tmp_path / "p")
    asked, run = [], api._IMPLEMENTATIONS["reference"]

    def reference(*arrays, **options):
        asked.append(options["text_len"])
        return run(*arrays, **options)

    monkeypatch.setitem(api._IMPLEMENTATIONS, "reference", reference)
    drawn = Pipeline.from_pretrained(tmp_path / "p", "float32", attention="reference")
    drawn(PROMPT, output="latents")
    assert asked


def test_times_are_those_that_a_call_visits(pipeline):
    seen = []
    pipeline(PROMPT, callback=lambda step, _: seen.append(step), output="latents")
    times = pipeline.timesteps()
    assert (times[0], len(times)) == (1000, len(seen))
    assert np.all(np.diff(times) < 0)
    assert len(pipeline.timesteps(steps=7)) == 7
