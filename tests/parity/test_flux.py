"""FLUX against the originals: converted weights, forward passes, TACA, LoRA gradients, sampling.

The recorded outputs are those of the authors' published pipeline and of PyTorch autograd, in
float32; weights go through `python -m convert` and the public loaders, as a user's do.
"""

import json
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from taca_jax.convert.cli import main
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.families.flux.model import (
    FLUX_DEV,
    FLUX_KREA,
    FLUX_SCHNELL,
    FluxConfig,
    FluxTransformer,
)
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.formats.lora.peft import tensors_of
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.nn.kinds import shapes_of
from taca_jax.nn.layers import LoRAParam, patchify
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.taca import TacaConfig
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.lora_files import append_lora_file, open_lora, read_lora, write_lora
from tests.compare import relative_error
from tests.golden import inputs_at_700, nhwc
from tests.models import FLUX, in_layout, layout_shapes
from tests.parity.lora_gradients import by_layer
from tests.random_models import random_model, randomise
from tests.shared import shared_path


@partial(jax.jit, static_argnums=0)
def _velocity(graph, state, inputs, options):
    return nnx.merge(graph, state)(*inputs, **options)


def tokens_of(model: FluxTransformer, inputs, **options) -> np.ndarray:
    """The velocity as the originals pack it, "b (h w) (c ph pw)"."""
    velocity = _velocity(*nnx.split(model), inputs, options)
    return np.asarray(patchify(velocity, model.config.patch_size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden pipeline, converted by the command."""
    dst = tmp_path_factory.mktemp("converted") / "flux"
    main(["flux", "--src", str(shared_path("golden/flux")), "--dst", str(dst)])
    return dst


@pytest.fixture(scope="module")
def model(folder) -> FluxTransformer:
    return load_model(folder / "transformer", LoadOptions(dtype=jnp.float32))


@pytest.fixture(scope="module")
def adapted(folder) -> FluxTransformer:
    with_lora = load_model(folder / "transformer", LoadOptions(dtype=jnp.float32))
    read_lora(lora_file(), with_lora)
    return with_lora


def lora_file():
    return shared_path("golden/flux/lora/pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(shared_path("golden/flux/golden.safetensors"))


@pytest.fixture(scope="module")
def train() -> dict[str, np.ndarray]:
    return load_file(shared_path("golden/flux/golden_train.safetensors"))


def test_forward(model, golden):
    inputs = inputs_at_700(golden)
    ours = tokens_of(model, inputs, guidance=jnp.full(2, 3.5))
    assert relative_error(ours, golden["forward.t0.7.g3.5"]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("to", "limit"), [("int8", 0.02), ("nf4", 0.25)])
def test_forward_of_a_quantised_model(folder, golden, to, limit):
    inputs = inputs_at_700(golden)
    quantised = load_model(folder / "transformer", LoadOptions(dtype=jnp.float32, quantize=to))
    ours = tokens_of(quantised, inputs, guidance=jnp.full(2, 3.5))
    error = relative_error(ours, golden["forward.t0.7.g3.5"])
    print(to, error)
    assert 1e-4 < error < limit


def test_forward_on_the_tpu_kernel(model, adapted, golden, train):
    """With the Pallas kernel, interpreted: plainly, and with a gamma per sample and the LoRA."""

    @partial(jax.jit, static_argnums=0)
    def velocity(graph, state, inputs, options):
        return nnx.merge(graph, state)(*inputs, **options, attention="pallas_interpret")

    plain = inputs_at_700(golden)
    taca = {
        "guidance": jnp.asarray(train["guidance"]),
        "gamma": jnp.asarray(train["gamma"]),
        "lora_scale": jnp.ones(2),
    }
    for which, inputs, options, theirs in (
        (model, plain, {"guidance": jnp.full(2, 3.5)}, golden["forward.t0.7.g3.5"]),
        (adapted, training_inputs(train), taca, train["velocity.gamma.lora"]),
    ):
        ours = velocity(*nnx.split(which), inputs, options)
        assert relative_error(patchify(ours, which.config.patch_size), theirs) <= 1e-5


def training_inputs(train):
    """The noised latents and their conditioning; t is the noise level, 0 to 1."""
    sigma = jnp.asarray(train["t"])
    level = sigma[:, None, None, None]
    latents = (1 - level) * nhwc(train["x0"]) + level * nhwc(train["noise"])
    return (
        latents,
        sigma * 1000,
        jnp.asarray(train["prompt_embeds"]),
        jnp.asarray(train["pooled_prompt_embeds"]),
    )


def test_gamma_per_sample(model, adapted, train):
    inputs, gamma = training_inputs(train), jnp.asarray(train["gamma"])
    guidance = jnp.asarray(train["guidance"])
    assert len(set(train["gamma"].tolist())) == 2
    for name, theirs in (
        ("velocity.gamma1", tokens_of(model, inputs, guidance=guidance)),
        ("velocity.gamma1", tokens_of(model, inputs, guidance=guidance, gamma=jnp.ones(2))),
        ("velocity.gamma", tokens_of(model, inputs, guidance=guidance, gamma=gamma)),
        # A LoRA that is loaded and off is no LoRA.
        (
            "velocity.gamma",
            tokens_of(adapted, inputs, guidance=guidance, gamma=gamma, lora_scale=jnp.zeros(2)),
        ),
        (
            "velocity.gamma.lora",
            tokens_of(adapted, inputs, guidance=guidance, gamma=gamma, lora_scale=jnp.ones(2)),
        ),
    ):
        assert relative_error(theirs, train[name]) <= 1e-5, name


def test_loss_and_every_lora_gradient(adapted, train):
    inputs = training_inputs(train)
    target = nhwc(train["noise"]) - nhwc(train["x0"])

    def loss(transformer):
        velocity = transformer(
            *inputs,
            guidance=jnp.asarray(train["guidance"]),
            gamma=jnp.asarray(train["gamma"]),
            lora_scale=jnp.ones(2),
        )
        return jnp.mean((velocity - target) ** 2)

    value, gradient = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRAParam)))(
        adapted
    )
    assert relative_error(value, train["loss"][0]) <= 1e-5

    ours, _ = tensors_of(by_layer(gradient, adapted), flux_diffusers.TABLE)
    theirs = {
        name.removeprefix("grad."): g for name, g in train.items() if name.startswith("grad.")
    }
    ours = {name.removeprefix("transformer."): g for name, g in ours.items()}
    assert ours.keys() == theirs.keys()
    assert len(theirs) == 50
    for name, expected in theirs.items():
        assert relative_error(ours[name], expected) <= 1e-4, name


@pytest.fixture(scope="module")
def pipeline(folder) -> FluxPipeline:
    return FluxPipeline.from_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("name", ["plain", "taca", "taca_lora"])
def test_trajectory_and_image(pipeline, golden, name):
    settings = json.loads(shared_path("golden/flux/golden.json").read_text())
    taca = TacaConfig(gamma=settings["gamma"], first_steps=settings["taca_steps"])
    pipeline.unload_lora()
    if name == "taca_lora":
        pipeline.load_lora(lora_file(), gate="taca")
    out = pipeline(
        steps=settings["steps"],
        guidance=settings["guidance_scale"],
        latents=nhwc(golden["latents"]),
        prompt_embeds=golden["prompt_embeds"],
        pooled_prompt_embeds=golden["pooled_prompt_embeds"],
        taca=None if name == "plain" else taca,
        output="array",
        trajectory=True,
    )
    theirs = golden[f"{name}.trajectory"]
    assert len(out.trajectory.latents) == len(theirs) == 10
    for step, (ours, expected) in enumerate(zip(out.trajectory.latents, theirs, strict=True)):
        assert relative_error(patchify(ours, 2), expected) <= 1e-4, step
    assert relative_error(out.images, nhwc(golden[f"{name}.image"])) <= 1e-4


def test_the_recorded_runs_differ_enough_to_tell_them_apart(golden):
    """So that no run passes for another within the tolerance of 1e-4."""
    plain, taca, lora = (golden[f"{n}.trajectory"][-1] for n in ("plain", "taca", "taca_lora"))
    assert relative_error(taca, plain) > 1e-3
    assert relative_error(lora, taca) > 1e-3


@pytest.mark.parametrize(
    "config", [FLUX_DEV, FLUX_SCHNELL, FLUX_KREA], ids=["dev", "schnell", "krea"]
)
def test_full_size_has_exactly_the_parameters_of_the_original(config):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel(**arguments(config))
    given = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert layout_shapes(flux_diffusers.TABLE, config) == given
    count = sum(math.prod(shape) for shape in shapes_of(config).values())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e9, 1) == 11.9
    assert FLUX_KREA == FLUX_DEV


def arguments(config: FluxConfig) -> dict:
    """What diffusers' class takes for a config."""
    settings = flux_diffusers.settings_of(config)
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def random_inputs(config: FluxConfig):
    keys = jax.random.split(jax.random.key(1), 3)
    return (
        jax.random.normal(keys[0], (2, 6, 4, config.latent_channels)),
        jnp.array([250.0, 990.0]),
        jax.random.normal(keys[1], (2, 5, config.txt_dim)),
        jax.random.normal(keys[2], (2, config.pooled_dim)),
    )


def in_diffusers(model: FluxTransformer, folder):
    """diffusers' model of our weights, exported to a folder that it loads itself."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    settings = flux_diffusers.settings_of(model.config)
    (folder / "config.json").write_text(json.dumps(settings))
    weights = in_layout(flux_diffusers.TABLE, model)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    return diffusers.FluxTransformer2DModel.from_pretrained(folder).eval()


def diffusers_velocity(theirs, inputs, guidance) -> np.ndarray:
    import torch

    latents, timestep, txt, pooled = inputs
    _, height, width, _ = latents.shape
    ids = np.zeros((height // 2, width // 2, 3), np.float32)
    ids[..., 1] = np.arange(height // 2)[:, None]
    ids[..., 2] = np.arange(width // 2)
    with torch.no_grad():
        return theirs(
            hidden_states=torch.tensor(np.asarray(patchify(latents, 2))),
            timestep=torch.tensor(np.asarray(timestep) / 1000),
            encoder_hidden_states=torch.tensor(np.asarray(txt)),
            pooled_projections=torch.tensor(np.asarray(pooled)),
            guidance=None if guidance is None else torch.tensor(np.asarray(guidance)),
            txt_ids=torch.zeros(txt.shape[1], 3),
            img_ids=torch.tensor(ids.reshape(-1, 3)),
            return_dict=False,
        )[0].numpy()


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_exported_weights_compute_the_same_in_diffusers(tmp_path, guidance_embed):
    config = replace(FLUX, guidance_embed=guidance_embed)
    model, inputs = random_model(config), random_inputs(config)
    guidance = jnp.array([1.0, 4.0]) if guidance_embed else None
    theirs = diffusers_velocity(in_diffusers(model, tmp_path), inputs, guidance)
    assert relative_error(tokens_of(model, inputs, guidance=guidance), theirs) <= 1e-5
    # And back through the command.
    (tmp_path / "back").mkdir()
    main(["flux", "--src", str(tmp_path), "--dst", str(tmp_path / "back")])
    again = load_model(tmp_path / "back", LoadOptions(dtype=jnp.float32))
    for ours, read in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(ours, read)


def test_a_lora_of_ours_does_the_same_in_diffusers(tmp_path):
    pytest.importorskip("peft")
    model, inputs = random_model(FLUX), random_inputs(FLUX)
    guidance = jnp.array([1.0, 4.0])
    theirs = in_diffusers(model, tmp_path)
    plain = diffusers_velocity(theirs, inputs, guidance)
    # Every linear layer, final_mod among them, whose halves diffusers stores the other way round;
    # alpha is not the rank. (PEFT takes the last layer's name, proj_out, for single blocks' too.)
    add_lora(model, LoRAConfig(rank=4, alpha=6.0), (r"(?!final_out).*",), rngs=nnx.Rngs(2))
    randomise(model, LoRAParam, scale=0.1)
    write_lora(tmp_path / "lora.safetensors", model)
    theirs.load_lora_adapter(tmp_path / "lora.safetensors")
    expected = diffusers_velocity(theirs, inputs, guidance)
    ours = tokens_of(model, inputs, guidance=guidance, lora_scale=jnp.ones(2))
    assert relative_error(expected, plain) > 0.05
    assert relative_error(ours, expected) <= 1e-5


def test_two_loras_with_strengths_are_two_adapters_in_diffusers(tmp_path):
    pytest.importorskip("peft")
    model, inputs = random_model(FLUX), random_inputs(FLUX)
    guidance = jnp.array([1.0, 4.0])
    theirs = in_diffusers(model, tmp_path)
    plain = diffusers_velocity(theirs, inputs, guidance)
    targets = {"own": ATTENTION_TARGETS, "style": (r"single_blocks\..*", "img_in")}
    for rank, (name, layers) in enumerate(targets.items(), 3):
        adapted = random_model(FLUX)
        add_lora(adapted, LoRAConfig(rank=rank, alpha=6.0), layers, rngs=nnx.Rngs(rank))
        randomise(adapted, LoRAParam, seed=rank, scale=0.1)
        file = tmp_path / f"{name}.safetensors"
        write_lora(file, adapted)
        theirs.load_lora_adapter(file, adapter_name=name)
        append_lora_file(open_lora(file, model), model)
    theirs.set_adapters(["own", "style"], [0.8, -0.6])
    expected = diffusers_velocity(theirs, inputs, guidance)
    strengths = jnp.array([[0.8, -0.6]] * 2)
    ours = tokens_of(model, inputs, guidance=guidance, lora_scale=strengths)
    assert relative_error(expected, plain) > 0.05
    assert relative_error(ours, expected) <= 1e-5
