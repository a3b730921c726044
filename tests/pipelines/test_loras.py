"""Several LoRAs on one pipeline: how they are written, and that each acts as strongly and exactly
when it is to."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora, linears, remove_lora
from taca_jax.pipelines.lora_choice import LoRAChoice, parse_loras
from taca_jax.sampling.loop import _compiled
from taca_jax.taca import MAX_TIMESTEP, TacaConfig
from taca_jax.weights.lora_files import load_adapter, write_lora
from taca_jax.weights.shipped import find_weights
from tests.processes import run_cluster
from tests.random_models import randomise
from tests.training.tiny import tiny_pipeline

PROMPT = "a red circle and a blue square"
TACA = TacaConfig(gamma=1.5, threshold=500)
STEPS = 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", [("a.safetensors", 1.0, None)]),
        ("a:0.8,b", [("a", 0.8, None), ("b", 1.0, None)]),
        ("a@taca:0.8, b@always", [("a", 0.8, "taca"), ("b", 1.0, "always")]),
        ("a:-1e-1", [("a", -0.1, None)]),
        # As models are named on a hub, where neither is a strength or a gate.
        ("me/style@v2:style.safetensors@taca:.5", [("me/style@v2:style.safetensors", 0.5, "taca")]),
        ("C:a@b", [("C:a@b", 1.0, None)]),
    ],
)
def test_loras_are_written_with_strengths_and_gates(text, expected):
    assert parse_loras(text) == tuple(LoRAChoice(*each) for each in expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lora=empty: expected FILE, FILE:STRENGTH, FILE@taca or FILE@always"),
        ("a,,b", "lora=a,,b: expected FILE, FILE:STRENGTH"),
        ("a:0.8.1", "the strength 0.8.1 is no number"),
        ("a:nan", "the strength of LoRA a is nan"),
        ("a,a:0.5", "names a twice"),
    ],
)
def test_what_names_no_lora_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_loras(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two LoRAs: of TACA, on the attention; and a style, of another rank, on other layers too."""
    folder = tmp_path_factory.mktemp("loras")
    for name, rank, targets, gate in (
        ("own", 2, ATTENTION_TARGETS, "taca"),
        ("style", 3, ("single_blocks.*",), None),
    ):
        model = tiny_pipeline().transformer
        add_lora(model, LoRAConfig(rank=rank, alpha=rank), targets, rngs=nnx.Rngs(rank))
        randomise(model, LoRAParam, scale=0.2)
        write_lora(folder / name, model, gate=gate)
    return folder


@pytest.fixture
def pipeline():
    return tiny_pipeline(steps=STEPS)


def merged(pipeline, *loras):
    """The transformer with kernels W + s1 A1 B1 + s2 A2 B2, summed in float64."""
    model = nnx.clone(pipeline.transformer)
    remove_lora(model)
    layers = dict(linears(model))
    for file, strength in loras:
        for (path, index), factors in load_adapter(file).adapter.items():
            kernel = np.asarray(layers[path].kernel[...], np.float64)
            at = () if index is None else (index,)
            kernel[at] += strength * factors.strength * factors.a.astype(np.float64) @ factors.b
            layers[path].kernel[...] = jnp.asarray(kernel, jnp.float32)
    return model


def latents(pipeline, taca=TACA, **options):
    out = pipeline(PROMPT, output="latents", taca=taca, trajectory=True, **options)
    return np.asarray(out.trajectory.latents)


def error(ours, expected):
    return np.linalg.norm(np.asarray(ours - expected)) / np.linalg.norm(np.asarray(expected))


@pytest.mark.parametrize("taca", [TACA, None])
def test_each_acts_at_its_strength_exactly_when_it_is_to(pipeline, folder, taca):
    """Step by step: from the same latents, a model with the sum of those that are on there."""
    pipeline.load_lora(f"{folder / 'style'}:0.7,{folder / 'own'}:0.9")
    found = latents(pipeline, taca)
    style, own = (folder / "style", 0.7), (folder / "own", 0.9)
    without, both = merged(pipeline, style), merged(pipeline, style, own)
    text = pipeline.encode_prompts([PROMPT])
    sigmas = pipeline.sigmas()
    before = pipeline.noise(1)
    on = 0
    for now, after, seen in zip(sigmas, sigmas[1:], found, strict=False):
        timestep = now * MAX_TIMESTEP
        acts = taca is not None and timestep >= taca.threshold
        on += acts
        model, other = (both, without) if acts else (without, both)
        gamma = jnp.array([taca.gamma if acts else 1.0])
        inputs = (before, jnp.array([timestep]), text.txt, text.pooled)
        expected, wrong = (before + (after - now) * m(*inputs, gamma=gamma) for m in (model, other))
        assert error(seen, expected) <= 1e-5
        assert error(seen, wrong) > 1e-4
        before = seen
    assert 0 < on < STEPS or taca is None


def test_one_program_serves_all_strengths(pipeline, folder):
    pipeline.load_lora([folder / "style", folder / "own"])
    whole = latents(pipeline)
    compiled = _compiled()._cache_size()
    halved = latents(pipeline, lora_strength=(0.5, 1.0))
    off = latents(pipeline, lora_strength=0.0)
    plain = latents(pipeline, None)
    assert error(halved, whole) > 1e-3
    pipeline.load_lora(folder / "own", strength=0.25)
    assert error(latents(pipeline), whole) > 1e-3
    assert _compiled()._cache_size() == compiled
    pipeline.unload_lora()
    assert error(latents(pipeline), off) <= 1e-5
    assert error(plain, latents(pipeline, None)) > 1e-3  # the style is on without TACA too


def test_neither_order_nor_way_of_loading_matters(pipeline, folder):
    first = pipeline.load_lora(folder / "style", strength=0.8)
    assert "rank 3" in first
    assert f"; used at 0.8, always on, as the file does not say when ({folder}/style@taca" in first
    assert pipeline.load_lora(str(folder / "own")).endswith("; used at 1, with TACA")
    one_by_one = latents(pipeline)
    pipeline.unload_lora()
    said = pipeline.load_lora(f"{folder}/own,{folder}/style:0.4", strength=1.0)
    assert len(said.splitlines()) == 2
    pipeline.load_lora(folder / "style", strength=0.8)  # in place of that at 0.4
    assert [(lora.name, lora.strength) for lora in pipeline.loras] == [
        (f"{folder}/own", 1.0),
        (f"{folder}/style", 0.8),
    ]
    assert error(latents(pipeline), one_by_one) <= 1e-5
    pipeline.unload_lora(folder / "own")
    alone = latents(pipeline)
    pipeline.unload_lora()
    pipeline.load_lora(folder / "style", strength=0.8)
    assert error(alone, latents(pipeline)) <= 1e-5


def test_a_gate_that_is_given_replaces_the_files(pipeline, folder):
    pipeline.load_lora(f"{folder}/style@taca")
    assert "used at 1, with TACA" in pipeline.load_lora(folder / "style", gate="taca")
    gated = latents(pipeline, None)
    pipeline.load_lora(f"{folder}/own@always")
    assert [lora.gate for lora in pipeline.loras] == ["taca", "always"]
    always = latents(pipeline, None)
    pipeline.unload_lora()
    assert error(gated, latents(pipeline, None)) <= 1e-5
    assert error(always, gated) > 1e-3


def test_nothing_is_attached_if_one_of_them_does_not_fit(pipeline, folder):
    pipeline.load_lora(folder / "own")
    before, loras = latents(pipeline), pipeline.loras
    with pytest.raises(UserError, match="is a LoRA of another model"):
        pipeline.load_lora([folder / "style", find_weights("shapes_taca.safetensors")])
    assert pipeline.loras == loras
    assert np.array_equal(latents(pipeline), before)


def test_strengths_that_do_not_fit_are_refused(pipeline, folder):
    pipeline.load_lora(folder / "own")
    with pytest.raises(UserError, match=r"2 values of lora_strength for 1 LoRAs \(.*own\)"):
        latents(pipeline, lora_strength=(1.0, 0.5))
    add_lora(pipeline.transformer, LoRAConfig(rank=1), ("img_in",), rngs=nnx.Rngs(0))
    pipeline.loras = ()
    with pytest.raises(UserError, match="has factors of 1 LoRAs, 0 of them loaded"):
        latents(pipeline)


def test_several_on_a_mesh_of_two_processes_act_as_on_one_device(pipeline, folder, tmp_path):
    pipeline.save(tmp_path / "model")
    loras = (f"{folder}/own", f"{folder}/style")
    arguments = (str(tmp_path / "model"), str(tmp_path / "pictures.npy"), *loras)
    script = ("-m", "tests.pipelines.loras_on_mesh")
    for each in run_cluster(*script, *arguments, processes=2, devices=2):
        assert each.returncode == 0, each.stderr[-3000:]
    pipeline.load_lora(f"{folder}/style:0.8,{folder}/own")
    expected = pipeline("a red circle", taca=TACA, num_images=4, output="array").images
    assert error(np.load(tmp_path / "pictures.npy"), expected) <= 1e-5
