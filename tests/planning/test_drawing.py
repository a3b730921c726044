"""What drawing takes on a slice of TPUs: what is chosen for released models, and a small plan."""

import importlib.util
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from taca_jax.errors import UserError
from taca_jax.parallel import choice
from taca_jax.parallel.chips import CHIPS
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.opening import Opening, samples_of
from taca_jax.planning.drawing import plan_drawing
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import published_pipeline
from tests.processes import run_python
from tests.training.tiny import tiny_pipeline

BF16 = LoadOptions(jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))


@pytest.mark.parametrize(
    ("base", "chip", "options", "stages"),
    [
        ("flux1-dev", "v5p", BF16, False),
        ("flux1-dev", "v6e", BF16, True),  # with T5 they are 33.7 GB
        ("flux1-dev", "v6e", replace(BF16, quantize="int8"), False),
        ("flux1-dev", "v5e", replace(BF16, quantize="int8"), True),
        ("sd35-large", "v6e", BF16, True),
        ("sd35-medium", "v6e", BF16, False),
    ],
)
def test_models_take_turns_where_not_all_of_them_fit(base, chip, options, stages, monkeypatch):
    monkeypatch.setattr(choice, "memory_of", lambda _: CHIPS[chip].memory)
    opening = Opening(published_pipeline(base), options)
    assert opening.place(MeshConfig(), jax.devices()[:1]).stages == stages


def test_guidance_without_embedding_makes_two_samples_of_a_picture():
    flux, sd3 = published_pipeline("flux1-dev"), published_pipeline("sd35-large")
    assert (samples_of(flux, 3), samples_of(sd3, 3), samples_of(sd3, 3, 1.0)) == (3, 6, 3)


def test_a_slice_or_base_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="plan=v6e-5: no such slice"):
        plan_drawing(GenerateConfig(base="flux1-dev", plan="v6e-5"))
    with pytest.raises(UserError, match="base=nothing is not there; plan for flux1-dev"):
        plan_drawing(GenerateConfig(base="nothing", plan="v6e-4"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ((), "context 4: 1 of 40 x 40 px at a time; all models in memory"),
        (("num_images=4", "guidance=2"), "data 4: 4 of 40 x 40 px at a time"),
        (("stages=true", "mesh.tensor=2", "mesh.fsdp=2"), "fsdp 2 x tensor 2: 1 of"),
    ],
)
def test_a_small_plan_of_drawing(tmp_path, changes, said):
    tiny_pipeline().save(tmp_path / "p")
    command = f"generate.py --config shapes_taca plan=v5e-4 base={tmp_path / 'p'} lora=none"
    done = run_python(*command.split(), *changes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stdout
    for line in ("reading a prompt", "drawing", "decoding", "least time of 3 steps"):
        assert line in done.stdout
