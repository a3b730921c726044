"""img2img: the steps that are taken, where they start, and what is refused before loading."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.generate import generate
from taca_jax.pipelines.image_inputs import first_step, noised
from taca_jax.taca import TacaConfig
from tests.training.tiny import tiny_pipeline

LOADING = "taca_jax.pipelines.pipeline.Pipeline.from_pretrained"
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(steps=8)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """100 x 40 pixels: a green square between black sides."""
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = (0, 255, 0)
    path = tmp_path_factory.mktemp("images") / "start.png"
    Image.fromarray(pixels).save(path)
    return path


def config(out: Path, image: Path | None, **changes) -> GenerateConfig:
    values = {
        "base": "shapes_base",
        "prompt": PROMPT,
        "image": None if image is None else str(image),
        "taca": TacaConfig(gamma=1.5, threshold=835),
        "steps": 5,
        "dtype": "float32",
        "out": str(out),
    }
    return GenerateConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("steps", "strength", "start"),
    [
        (50, 0.6, 20),
        (30, 0.7, 9),
        (28, 0.95, 1),
        (4, 0.1, 3),
        (4, 1e-18, 3),
        (1, 0.5, 0),
        (9, 1, 0),
    ],
)
def test_the_last_share_of_the_steps_is_taken(pipeline, steps, strength, start):
    """As diffusers' get_timesteps says."""
    assert first_step(steps, strength) == start
    left = pipeline.sigmas(steps=steps, strength=strength)
    assert np.array_equal(left, pipeline.sigmas(steps=steps)[start:])
    times = pipeline.timesteps(steps=steps, strength=strength)
    np.testing.assert_allclose(times, 1000 * left[:-1])


def test_a_picture_is_cropped_to_the_size_around_its_centre(pipeline, picture):
    green = np.broadcast_to(np.float32([-1, 1, -1]), (1, 40, 40, 3))
    for image in (picture, str(picture), Image.open(picture)):
        np.testing.assert_allclose(pipeline.encode_images(image), green)
    two = pipeline.encode_images([picture, picture], height=40, width=80)
    assert two.shape == (2, 40, 80, 3)
    assert two[0, :, 0].max() < -0.9  # black
    with pytest.raises(UserError, match="40 x 41 pixels: both must be multiples of 4"):
        pipeline.encode_images(picture, width=41)


def test_a_run_starts_from_the_noised_image(pipeline, picture):
    image, noise = pipeline.encode_images(picture), pipeline.noise(2, seed=3)
    sigma = pipeline.sigmas(strength=0.5)[0]
    start = noised(image, noise, sigma)
    np.testing.assert_allclose(start, sigma * noise + (1 - sigma) * image, atol=1e-6)
    options = {"num_images": 2, "seed": 3, "output": "latents", "taca": TacaConfig(threshold=500)}
    drawn = pipeline(PROMPT, image=picture, strength=0.5, trajectory=True, **options)
    assert len(drawn.trajectory.latents) == 4  # of 8 steps
    for other in (image, jnp.asarray(image), [picture, Image.open(picture)]):
        again = pipeline(PROMPT, image=other, strength=0.5, **options).latents
        np.testing.assert_allclose(again, drawn.latents, atol=1e-5)
    default = pipeline(PROMPT, image=image, trajectory=True, **options)
    assert len(default.trajectory.latents) == 5  # 0.6
    plain = pipeline(PROMPT, **options).latents
    assert np.array_equal(pipeline(PROMPT, image=image, strength=1, **options).latents, plain)


def test_what_does_not_fit_is_refused(pipeline, picture):
    with pytest.raises(UserError, match=r"strength is 0\.5 without image="):
        pipeline(PROMPT, strength=0.5)
    for strength in (0, -1, 1.5):
        with pytest.raises(UserError, match=rf"strength is {strength}; it must be above 0"):
            pipeline(PROMPT, image=picture, strength=strength)
    with pytest.raises(UserError, match=r"latents are \(1, 8, 8, 3\); expected \(1, 40, 40, 3\)"):
        pipeline(PROMPT, image=np.zeros((1, 8, 8, 3)))
    with pytest.raises(UserError, match="2 images for 3 pictures; give one"):
        pipeline(PROMPT, image=[picture, picture], num_images=3)
    bare = tiny_pipeline()
    bare.autoencoder = None
    with pytest.raises(UserError, match="no autoencoder, which image= needs"):
        bare(PROMPT, image=picture, height=64, width=64, output="latents")


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_the_command_draws_from_an_image_in_stages_too(tmp_path, picture, capsys):
    changes = {"num_images": 3, "batch_size": 2, "preview": "own"}
    paths = generate(config(tmp_path / "x.png", picture, **changes))
    assert "TACA acts on none of 3 steps (t >= 835)" in capsys.readouterr().out
    np.testing.assert_array_equal(drawn(tmp_path / "x-preview.png"), drawn(paths[2]))
    with Image.open(paths[1]) as image:
        said = json.loads(image.text["taca_jax"])
    assert (said["image"], said["strength"], said["seed"]) == (str(picture), 0.6, 1)
    staged = generate(config(tmp_path / "y.png", picture, stages=True, **changes))
    for one, other in zip(paths, staged, strict=True):
        np.testing.assert_array_equal(drawn(one), drawn(other))


@pytest.mark.parametrize("by", ["prompt", "prompts"])
def test_an_image_that_cannot_be_read_is_refused_before_anything_loads(
    tmp_path, picture, monkeypatch, by
):
    monkeypatch.setattr(LOADING, lambda *_, **__: pytest.fail("loaded"))
    changes = {}
    if by == "prompts":
        (tmp_path / "list.txt").write_text(PROMPT)
        changes = {"prompt": "", "prompts": str(tmp_path / "list.txt")}
    with pytest.raises(UserError, match=r"image=.*nowhere\.png cannot be read \(No such file"):
        generate(config(tmp_path / "x.png", tmp_path / "nowhere.png", **changes))
    (tmp_path / "text.png").write_text("a red circle")
    with pytest.raises(UserError, match=r"cannot be read \(not a PNG, JPEG or WebP picture\)"):
        generate(config(tmp_path / "x.png", tmp_path / "text.png", **changes))
    pipeline = tiny_pipeline()
    pipeline.autoencoder = None
    pipeline.save(tmp_path / "base")
    size = {"base": str(tmp_path / "base"), "height": 64, "width": 64}
    with pytest.raises(UserError, match="base has no autoencoder, which pictures are made with"):
        generate(config(tmp_path / "x.png", picture, **size, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0.0}, "strength is 0.0; it must be above 0 and at most 1"),
        ({"strength": 1.1}, "strength is 1.1; it must be above 0 and at most 1"),
        ({"strength": 0.5, "image": None}, "strength is 0.5; it must be left out without image="),
        ({"plan": "v6e-1"}, "image is start.png; it must be left out with plan="),
    ],
)
def test_settings_that_do_nothing_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        GenerateConfig(**{"base": "b", "prompt": PROMPT, "image": "start.png", **changes})
