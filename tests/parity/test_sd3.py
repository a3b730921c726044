"""Stable Diffusion 3 against the originals: converted weights, TACA, LoRA gradients, sampling.

The recorded outputs are those of the authors' published pipeline on diffusers, of PyTorch autograd
and of Stability AI's own model code, in float32; weights go through `python -m convert` and the
public loaders, as a user's do.
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
from taca_jax.families.sd3 import diffusers as sd3_diffusers
from taca_jax.families.sd3 import stability as sd3_native
from taca_jax.families.sd3.model import (
    SD3_MEDIUM,
    SD35_LARGE,
    SD35_MEDIUM,
    SD3Config,
    SD3Transformer,
)
from taca_jax.families.sd3.pipeline import SD3Pipeline
from taca_jax.families.sd3.positions import sinusoids
from taca_jax.formats.lora.peft import tensors_of
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.nn.kinds import flat_params, shapes_of
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.sampling.loop import SkipLayers
from taca_jax.taca import TacaConfig
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.lora_files import read_lora, write_lora
from tests.compare import relative_error
from tests.golden import inputs_at_700, nhwc
from tests.models import SD3, in_layout, layout_shapes
from tests.parity.lora_gradients import by_layer
from tests.random_models import random_model, randomise
from tests.shared import shared_path


def nchw(array: jax.Array) -> np.ndarray:
    return np.asarray(array).transpose(0, 3, 1, 2)


@partial(jax.jit, static_argnums=0)
def _velocity(graph, state, inputs, options):
    return nnx.merge(graph, state)(*inputs, **options)


def velocity(model: SD3Transformer, inputs, **options) -> np.ndarray:
    """The velocity, NCHW."""
    return nchw(_velocity(*nnx.split(model), inputs, options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden pipeline, converted by the command."""
    dst = tmp_path_factory.mktemp("converted") / "sd3"
    main(["sd3", "--src", str(shared_path("golden/sd3")), "--dst", str(dst)])
    return dst


@pytest.fixture(scope="module")
def model(folder) -> SD3Transformer:
    return load_model(folder / "transformer", LoadOptions(dtype=jnp.float32))


def lora_file():
    return shared_path("golden/sd3/lora/pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def adapted(folder) -> SD3Transformer:
    with_lora = load_model(folder / "transformer", LoadOptions(dtype=jnp.float32))
    read_lora(lora_file(), with_lora)
    return with_lora


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(shared_path("golden/sd3/golden.safetensors"))


@pytest.fixture(scope="module")
def train() -> dict[str, np.ndarray]:
    return load_file(shared_path("golden/sd3/golden_train.safetensors"))


def test_forward(model, golden):
    inputs = inputs_at_700(golden)
    assert relative_error(velocity(model, inputs), golden["forward.t700"]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("to", "limit"), [("int8", 0.02), ("nf4", 0.25)])
def test_forward_of_a_quantised_model(folder, golden, to, limit):
    inputs = inputs_at_700(golden)
    quantised = load_model(folder / "transformer", LoadOptions(dtype=jnp.float32, quantize=to))
    error = relative_error(velocity(quantised, inputs), golden["forward.t700"])
    print(to, error)
    assert 1e-4 < error < limit


def test_stability_ais_own_model_and_file(tmp_path):
    """float16 weights, q, k and v in one, no block between the dual ones and the last."""
    file = shared_path("golden/sd35_native/sd3.5_medium.safetensors")
    main(["sd3", "--src", str(file), "--dst", str(tmp_path / "sd3")])
    main(["verify", "--src", str(file), "--dst", str(tmp_path / "sd3")])
    native = load_model(tmp_path / "sd3", LoadOptions(dtype=jnp.float32, param_dtype=jnp.float32))
    golden = load_file(shared_path("golden/sd35_native/golden.safetensors"))
    inputs = (
        nhwc(golden["x"]),
        jnp.asarray(golden["t"]),
        jnp.asarray(golden["context"]),
        jnp.asarray(golden["y"]),
    )
    assert relative_error(velocity(native, inputs), golden["velocity"]) <= 1e-5


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
    assert len(set(train["gamma"].tolist())) == 2
    for name, ours in (
        ("velocity.gamma1", velocity(model, inputs)),
        # A LoRA that is loaded and off is no LoRA, and a gamma of 1 none.
        (
            "velocity.gamma1",
            velocity(adapted, inputs, gamma=jnp.ones(2), lora_scale=jnp.zeros(2)),
        ),
        ("velocity.gamma", velocity(adapted, inputs, gamma=gamma, lora_scale=jnp.zeros(2))),
        ("velocity.gamma.lora", velocity(adapted, inputs, gamma=gamma, lora_scale=jnp.ones(2))),
    ):
        assert relative_error(ours, train[name]) <= 1e-5, name


def test_loss_and_every_lora_gradient(adapted, train):
    inputs = training_inputs(train)
    target = nhwc(train["noise"]) - nhwc(train["x0"])

    def loss(transformer):
        ours = transformer(*inputs, gamma=jnp.asarray(train["gamma"]), lora_scale=jnp.ones(2))
        return jnp.mean((ours - target) ** 2)

    value, gradient = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRAParam)))(
        adapted
    )
    assert relative_error(value, train["loss"][0]) <= 1e-5

    ours, _ = tensors_of(by_layer(gradient, adapted), sd3_diffusers.table_of(adapted.config))
    theirs = {
        name.removeprefix("grad."): g for name, g in train.items() if name.startswith("grad.")
    }
    ours = {name.removeprefix("transformer."): g for name, g in ours.items()}
    assert ours.keys() == theirs.keys()
    assert len(theirs) == 62
    for name, expected in theirs.items():
        if expected.any():
            assert relative_error(ours[name], expected) <= 1e-4, name
        else:  # what the text's queries of the last block attend to goes nowhere
            assert "transformer_blocks.3.attn.add_q_proj" in name
            assert not ours[name].any()


@pytest.fixture(scope="module")
def pipeline(folder) -> SD3Pipeline:
    return SD3Pipeline.from_pretrained(folder, dtype="float32")


def embeddings(golden) -> dict[str, np.ndarray]:
    names = ("prompt_embeds", "pooled_prompt_embeds")
    return {
        f"{sign}{name}": golden[f"{sign}{name}"] for sign in ("", "negative_") for name in names
    }


@pytest.mark.parametrize("name", ["plain_slg", "taca", "taca_lora"])
def test_trajectory(pipeline, golden, name):
    """At 1024 px, with the LoRA loaded in all, and on in one: that all are one program."""
    settings = json.loads(shared_path("golden/sd3/golden.json").read_text())
    pipeline.load_lora(lora_file(), gate="taca")
    taca = TacaConfig(gamma=settings["gamma"], first_steps=settings["taca_steps"])
    out = pipeline(
        steps=settings["steps"],
        guidance=settings["guidance_scale"],
        latents=nhwc(golden["latents"]),
        **embeddings(golden),
        taca=None if name == "plain_slg" else taca,
        lora_strength=1.0 if name == "taca_lora" else 0.0,
        output="latents",
        trajectory=True,
    )
    steps = (2, settings["steps"] - 1)
    assert len(golden[f"{name}.trajectory"]) == len(steps)
    for step, expected in zip(steps, golden[f"{name}.trajectory"], strict=True):
        assert relative_error(nchw(out.trajectory.latents[step]), expected) <= 1e-4, step


def test_the_recorded_run_has_too_few_steps_for_its_skip_layer_guidance():
    settings = json.loads(shared_path("golden/sd3/golden.json").read_text())
    given = settings["skip_layer_guidance"]
    skip = SkipLayers(tuple(given["layers"]), given["scale"], given["start"], given["stop"])
    assert not skip.scales(settings["steps"]).any()
    assert skip.scales(12).tolist() == pytest.approx([0, 2.8, 2.8, *[0] * 9])


def test_the_recorded_runs_differ_enough_to_tell_them_apart(golden):
    """So that no run passes for another within the tolerance of 1e-4."""
    plain, taca, lora = (golden[f"{n}.trajectory"][-1] for n in ("plain_slg", "taca", "taca_lora"))
    assert relative_error(taca, plain) > 1e-3
    assert relative_error(lora, taca) > 1e-3


def test_skip_layer_guidance_and_picture_against_diffusers(pipeline, golden):
    """diffusers' pipeline with the recorded weights, with steps enough for the guidance to act."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    src = shared_path("golden/sd3")
    absent = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    theirs = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel.from_pretrained(src / "transformer"),
        vae=diffusers.AutoencoderKL.from_pretrained(src / "vae"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(src / "scheduler"),
        **dict.fromkeys(absent),
    )
    theirs.set_progress_bar_config(disable=True)
    latents = golden["latents"][:, :, :8, :12]
    seen = []

    def callback(_, step, timestep, kwargs):
        seen.append((float(timestep), kwargs["latents"].numpy()))
        return {}

    text = embeddings(golden)
    images = theirs(
        num_inference_steps=12,
        guidance_scale=4.5,
        height=64,
        width=96,
        latents=torch.tensor(latents),
        **{name: torch.tensor(value) for name, value in text.items()},
        skip_guidance_layers=[1, 3],
        output_type="np",
        callback_on_step_end=callback,
    ).images
    pipeline.unload_lora()
    run = partial(
        pipeline,
        steps=12,
        guidance=4.5,
        latents=nhwc(latents),
        **text,
        output="array",
        trajectory=True,
    )
    ours = run(skip_layers=[1, 3])
    assert len(seen) == 12
    for step, (_, expected) in enumerate(seen):
        assert relative_error(nchw(ours.trajectory.latents[step]), expected) <= 1e-4, step
    assert relative_error(ours.images, images) <= 1e-4
    # It acts at steps 1 and 2 of 12, and enough to be told from its absence.
    plain = run(skip_layers=SkipLayers((1, 3), scale=0.0))
    for step, least, most in ((0, 0.0, 1e-6), (1, 1e-3, 1.0)):
        difference = relative_error(plain.trajectory.latents[step], ours.trajectory.latents[step])
        assert least <= difference <= most


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(SD35_MEDIUM, 2_469_663_936), (SD35_LARGE, 8_146_280_768), (SD3_MEDIUM, 2_084_951_104)],
    ids=["3.5-medium", "3.5-large", "3-medium"],
)
def test_full_size_has_exactly_the_parameters_of_the_original(config, parameters):
    """Those of diffusers' model and the table of positions."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    # Its table would be computed in full even on the meta device.
    small = {**arguments(config), "pos_embed_max_size": 4}
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(**small)
    given = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    given["pos_embed.pos_embed"] = (1, config.position_size**2, config.hidden)
    assert layout_shapes(sd3_diffusers.table_of(config), config) == given
    count = sum(math.prod(shape) for shape in shapes_of(config).values())
    places = config.position_size**2 * config.hidden
    assert count - places == sum(p.numel() for p in theirs.parameters())
    assert count == parameters


def arguments(config: SD3Config) -> dict:
    """What diffusers' class takes for a config."""
    settings = sd3_diffusers.settings_of(config)
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def test_a_fresh_table_of_positions_is_the_originals():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    theirs = embeddings.get_2d_sincos_pos_embed(24, 12, base_size=64, output_type="pt")
    np.testing.assert_allclose(sinusoids(12, 24), theirs.numpy(), atol=2e-6)


def random_inputs(config: SD3Config):
    keys = jax.random.split(jax.random.key(1), 3)
    return (
        jax.random.normal(keys[0], (2, 6, 10, config.latent_channels)),
        jnp.array([250.0, 990.0]),
        jax.random.normal(keys[1], (2, 5, config.txt_dim)),
        jax.random.normal(keys[2], (2, config.pooled_dim)),
    )


def in_diffusers(model: SD3Transformer, folder):
    """diffusers' model of our weights, exported to a folder that it loads itself."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    folder.mkdir(exist_ok=True)
    settings = sd3_diffusers.settings_of(model.config)
    (folder / "config.json").write_text(json.dumps(settings))
    weights = in_layout(sd3_diffusers.table_of(model.config), model)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    return diffusers.SD3Transformer2DModel.from_pretrained(folder).eval()


def diffusers_velocity(theirs, inputs, **options) -> np.ndarray:
    import torch

    latents, timestep, txt, pooled = inputs
    with torch.no_grad():
        return theirs(
            hidden_states=torch.tensor(nchw(latents)),
            timestep=torch.tensor(np.asarray(timestep)),
            encoder_hidden_states=torch.tensor(np.asarray(txt)),
            pooled_projections=torch.tensor(np.asarray(pooled)),
            return_dict=False,
            **options,
        )[0].numpy()


def test_exported_folders_load_in_diffusers(tmp_path, folder):
    """The golden pipeline, there and back: diffusers reads what it read in the first place."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    main(["export", "--src", str(folder), "--dst", str(tmp_path / "theirs"), "--shard-gb", "1e-3"])
    for name, cls in (
        ("transformer", diffusers.SD3Transformer2DModel),
        ("vae", diffusers.AutoencoderKL),
    ):
        first = cls.from_pretrained(shared_path("golden/sd3") / name).state_dict()
        again, said = cls.from_pretrained(tmp_path / "theirs" / name, output_loading_info=True)
        assert not any(said.values()), said
        assert again.state_dict().keys() == first.keys()
        assert all(again.state_dict()[key].equal(value) for key, value in first.items())


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_dual_layers": 0, "qk_norm": "none"}],
    ids=["3.5-medium's kind", "3-medium's kind"],
)
def test_exported_weights_compute_the_same_in_diffusers(tmp_path, changes):
    config = replace(SD3, **changes)
    model, inputs = random_model(config), random_inputs(config)
    theirs = in_diffusers(model, tmp_path / "theirs")
    skip = jnp.array([True, False, True, True])
    for ours, expected in (
        (velocity(model, inputs), diffusers_velocity(theirs, inputs)),
        (
            velocity(model, inputs, skip=skip),
            diffusers_velocity(theirs, inputs, skip_layers=[0, 2, 3]),
        ),
    ):
        assert relative_error(ours, expected) <= 1e-5
    # And back through the command, from both layouts.
    native = tmp_path / "native.safetensors"
    weights = in_layout(sd3_native.table_of(config), model)
    write_tensors(native, {sd3_native.PREFIX + name: array for name, array in weights.items()})
    main(["sd3", "--src", str(tmp_path / "theirs"), "--dst", str(tmp_path / "back")])
    arrays = flat_params(model)
    again = flat_params(load_model(tmp_path / "back", LoadOptions(dtype=jnp.float32)))
    for name, array in arrays.items():
        np.testing.assert_array_equal(array.get_value(), again[name].get_value())
    if config.qk_norm == "rms":  # its heads are not 64 wide, which no norm says in the other
        main(["sd3", "--src", str(native), "--dst", str(tmp_path / "again")])
        again = flat_params(load_model(tmp_path / "again", LoadOptions(dtype=jnp.float32)))
        for name, array in arrays.items():
            np.testing.assert_array_equal(array.get_value(), again[name].get_value())


def test_a_lora_of_ours_does_the_same_in_diffusers(tmp_path):
    pytest.importorskip("peft")
    model, inputs = random_model(SD3), random_inputs(SD3)
    theirs = in_diffusers(model, tmp_path / "theirs")
    plain = diffusers_velocity(theirs, inputs)
    # Every linear layer but what is a convolution there; final_mod and the last block's text, whose
    # halves diffusers stores the other way round, among them; alpha is not the rank.
    add_lora(model, LoRAConfig(rank=4, alpha=6.0), (r"(?!img_in).*",), rngs=nnx.Rngs(2))
    randomise(model, LoRAParam, scale=0.1)
    write_lora(tmp_path / "lora.safetensors", model)
    theirs.load_lora_adapter(tmp_path / "lora.safetensors")
    expected = diffusers_velocity(theirs, inputs)
    ours = velocity(model, inputs, lora_scale=jnp.ones(2))
    assert relative_error(expected, plain) > 0.05
    assert relative_error(ours, expected) <= 1e-5
    # And as kohya's, read again.
    write_lora(tmp_path / "kohya.safetensors", model, "kohya")
    names = load_file(tmp_path / "kohya.safetensors")
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight" in names
    read_lora(tmp_path / "kohya.safetensors", model)
    assert relative_error(velocity(model, inputs, lora_scale=jnp.ones(2)), ours) <= 1e-5
