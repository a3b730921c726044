"""From prompts to pictures, against diffusers' whole pipelines on the same small random weights.

The text encoders have the whole vocabularies of the real tokenizers; what diffusers saves is read
as it is and through `python -m convert`.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from taca_jax.convert.cli import main
from taca_jax.families.flux.family import FLUX
from taca_jax.families.sd3.family import SD3
from taca_jax.nn.layers import patchify
from taca_jax.pipelines.pipeline import Pipeline
from tests.compare import relative_error
from tests.parity.test_prompts import clip, clip_tokenizer, t5, t5_tokenizer
from tests.shared import shared_path

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle left of a blue square", "Кошка and 🐈‍⬛ on a naïve café's roof"]
NEGATIVE = "blurred, low quality"
HEIGHT, WIDTH, STEPS = 64, 96, 6


def latents_of(channels: int, batch: int) -> np.ndarray:
    """Noise, NHWC."""
    shape = (batch, HEIGHT // 8, WIDTH // 8, channels)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def parts_of(golden, transformer: str) -> dict:
    """The recorded transformer, autoencoder and scheduler."""
    classes = {
        "transformer": getattr(diffusers, transformer),
        "vae": diffusers.AutoencoderKL,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
    }
    return {name: cls.from_pretrained(golden / name) for name, cls in classes.items()}


def both(theirs, kind: str, folder):
    """Ours of what diffusers saves, as it is and converted."""
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "original")
    main([kind, "--src", str(folder / "original"), "--dst", str(folder / "converted")])
    return [
        Pipeline.from_pretrained(folder / name, "float32") for name in ("original", "converted")
    ]


def assert_same_pictures(ours, expected: np.ndarray) -> None:
    original, converted = ours
    assert np.array_equal(original, converted)
    assert expected.std() > 0.05
    assert relative_error(original, expected) <= 1e-4
    print(f"pictures differ by {relative_error(original, expected):.1e}")


def test_flux(tmp_path):
    parts = parts_of(shared_path("golden/flux"), "FluxTransformer2DModel")
    config = parts["transformer"].config
    theirs = diffusers.FluxPipeline(
        **parts,
        text_encoder=clip("CLIPTextModel", config.pooled_projection_dim),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(config.joint_attention_dim),
        tokenizer_2=t5_tokenizer(),
    )
    ours = both(theirs, "flux", tmp_path)
    assert ours[0].family is FLUX
    latents = latents_of(16, len(PROMPTS))
    options = {"guidance": 3.5, "steps": STEPS, "latents": jnp.asarray(latents)}
    made = [pipeline(PROMPTS, **options, output="array").images for pipeline in ours]
    expected = theirs(
        PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        latents=torch.tensor(np.asarray(patchify(jnp.asarray(latents), 2))),
        output_type="np",
    ).images
    assert_same_pictures(made, expected)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_flux_from_an_image(strength):
    """The start and the steps that are left, from the same latents of an image and noise."""
    golden = shared_path("golden/flux")
    parts = parts_of(golden, "FluxTransformer2DModel")
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    theirs = diffusers.FluxImg2ImgPipeline(**parts, **nothing)
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_pretrained(golden, "float32")
    config, rng = parts["transformer"].config, np.random.default_rng(1)
    embeds = rng.standard_normal((1, 7, config.joint_attention_dim), np.float32)
    pooled = rng.standard_normal((1, config.pooled_projection_dim), np.float32)
    image = latents_of(16, 1)
    shape = (1, 16, HEIGHT // 8, WIDTH // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    made = ours(
        prompt_embeds=jnp.asarray(embeds),
        pooled_prompt_embeds=jnp.asarray(pooled),
        latents=jnp.asarray(noise.numpy().transpose(0, 2, 3, 1)),
        image=image,
        strength=strength,
        guidance=3.5,
        steps=STEPS,
        output="array",
    ).images
    expected = theirs(
        prompt_embeds=torch.tensor(embeds),
        pooled_prompt_embeds=torch.tensor(pooled),
        image=torch.tensor(image.transpose(0, 3, 1, 2)),
        strength=strength,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    assert expected.std() > 0.05
    assert relative_error(made, expected) <= 1e-4


@pytest.mark.parametrize("with_t5", [True, False])
def test_stable_diffusion_3(tmp_path, with_t5):
    parts = parts_of(shared_path("golden/sd3"), "SD3Transformer2DModel")
    config = parts["transformer"].config
    bigg = config.pooled_projection_dim // 2
    theirs = diffusers.StableDiffusion3Pipeline(
        **parts,
        text_encoder=clip(
            "CLIPTextModelWithProjection", config.pooled_projection_dim - bigg, hidden=16
        ),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(
            "CLIPTextModelWithProjection", bigg, activation="gelu", seed=1, hidden=16
        ),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5(config.joint_attention_dim) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )
    ours = both(theirs, "sd3", tmp_path)
    assert ours[0].family is SD3
    latents = latents_of(16, 2 * len(PROMPTS))
    options = {"guidance": 4.5, "steps": STEPS, "latents": jnp.asarray(latents), "num_images": 2}
    made = [pipeline(PROMPTS, NEGATIVE, **options, output="array").images for pipeline in ours]
    expected = theirs(
        PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=4.5,
        num_images_per_prompt=2,
        latents=torch.tensor(latents.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    assert_same_pictures(made, expected)


@pytest.mark.parametrize(
    ("given", "strength"),
    [("latents", 0.3), ("latents", 0.7), ("latents", 1.0), ("picture", 0.7)],
)
def test_stable_diffusion_3_from_an_image(monkeypatch, given, strength):
    """As FLUX, with classifier-free guidance; and from a picture, of whose latents both take the
    mean, where diffusers otherwise draws a sample."""
    golden = shared_path("golden/sd3")
    parts = parts_of(golden, "SD3Transformer2DModel")
    names = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    theirs = diffusers.StableDiffusion3Img2ImgPipeline(**parts, **dict.fromkeys(names))
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_pretrained(golden, "float32")
    config, rng = parts["transformer"].config, np.random.default_rng(1)
    text = {}
    for sign in ("", "negative_"):
        shapes = {
            "prompt_embeds": (1, 7, config.joint_attention_dim),
            "pooled_prompt_embeds": (1, config.pooled_projection_dim),
        }
        text |= {f"{sign}{name}": rng.standard_normal(x, np.float32) for name, x in shapes.items()}
    if given == "latents":
        image = latents_of(16, 1)
        their_image = torch.tensor(image.transpose(0, 3, 1, 2))
    else:
        pixels = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        image = their_image = Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BOX)
        gaussian = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
        monkeypatch.setattr(gaussian, "sample", lambda found, generator=None: found.mode())
    shape = (1, 16, HEIGHT // 8, WIDTH // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    made = ours(
        **{name: jnp.asarray(array) for name, array in text.items()},
        latents=jnp.asarray(noise.numpy().transpose(0, 2, 3, 1)),
        image=image,
        height=HEIGHT,
        width=WIDTH,
        strength=strength,
        guidance=4.5,
        steps=STEPS,
        output="array",
    ).images
    expected = theirs(
        **{name: torch.tensor(array) for name, array in text.items()},
        image=their_image,
        strength=strength,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=4.5,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    assert expected.std() > 0.05
    print(f"pictures differ by {relative_error(made, expected):.1e}")
    assert relative_error(made, expected) <= 1e-4
