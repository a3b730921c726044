"""FLUX.2 [klein] against the originals: every part, whole runs, and the LoRA's gradients.

The recorded outputs are those of diffusers' pipeline and of PyTorch autograd, in float32; weights
go through `python -m convert` and the public loaders, as a user's do.
"""

import json
import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import taca_jax as tj
from taca_jax.autoencoders import patched_vae_layout, vae_original
from taca_jax.autoencoders.patched_vae import EPSILON, PatchedVAE
from taca_jax.convert.cli import main
from taca_jax.families.flux2 import diffusers as flux2_diffusers
from taca_jax.families.flux2.family import FLUX2_VAE
from taca_jax.families.flux2.model import (
    FLUX2_DEV,
    KLEIN_BASE_4B,
    KLEIN_BASE_9B,
    Flux2Config,
    Flux2Transformer,
)
from taca_jax.families.flux2.text import Flux2Text
from taca_jax.formats.lora.peft import tensors_of
from taca_jax.formats.tensor_files import ArrayTensors
from taca_jax.nn.kinds import flat_params, shapes_of
from taca_jax.nn.layers import LoRAParam, patchify
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.text import qwen3_layout
from taca_jax.text.qwen3 import CHAT, QWEN3_4B, QWEN3_8B
from taca_jax.text.tokenizers import FolderTokenizer
from taca_jax.weights.folders import load_model, save_model
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.lora_files import read_lora, write_lora
from tests.compare import relative_error
from tests.families.flux2.tiny import FLUX2
from tests.golden import nhwc
from tests.models import from_layout, in_layout, layout_shapes
from tests.parity.lora_gradients import by_layer
from tests.random_models import random_model, randomise
from tests.shared import shared_path


@partial(jax.jit, static_argnums=0)
def _velocity(graph, state, inputs, options):
    return nnx.merge(graph, state)(*inputs, **options)


def packed(latents: jax.Array) -> np.ndarray:
    """Tokens as the originals pack them, row by row."""
    return np.asarray(latents).reshape(*latents.shape[:-3], -1, latents.shape[-1])


def tokens_of(model: Flux2Transformer, inputs, **options) -> np.ndarray:
    return packed(_velocity(*nnx.split(model), inputs, options))


@pytest.fixture(scope="module")
def source():
    return shared_path("golden/flux2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source):
    """The golden pipeline, converted by the command."""
    dst = tmp_path_factory.mktemp("converted") / "flux2"
    main(["flux2", "--src", str(source), "--dst", str(dst)])
    return dst


@pytest.fixture(scope="module")
def golden(source) -> dict[str, np.ndarray]:
    return load_file(source / "golden.safetensors")


@pytest.fixture(scope="module")
def said(source) -> dict:
    return json.loads((source / "golden.json").read_text())


@pytest.fixture(scope="module")
def train(source) -> dict[str, np.ndarray]:
    return load_file(source / "golden_train.safetensors")


@pytest.fixture(scope="module")
def lora_file(source):
    return source / "lora" / "pytorch_lora_weights.safetensors"


def loaded(folder):
    return load_model(folder, LoadOptions(dtype=jnp.float32, param_dtype=jnp.float32))


@pytest.fixture(scope="module")
def model(folder) -> Flux2Transformer:
    return loaded(folder / "transformer")


@pytest.fixture(scope="module")
def adapted(folder, lora_file) -> Flux2Transformer:
    with_lora = loaded(folder / "transformer")
    read_lora(lora_file, with_lora)
    return with_lora


def test_what_was_converted_is_what_is_there(folder, source, capsys):
    main(["verify", "--src", str(source), "--dst", str(folder)])
    assert capsys.readouterr().out.count("equal, 0 rounded") == 3


def in_black_forest_labs_names(tensors, levels: int) -> dict[str, np.ndarray]:
    """The autoencoder of a diffusers folder as `ae.safetensors` of the authors has it: names by
    their published code (flux2, autoencoder.py), 1 x 1 convolutions for the attention's products,
    and the count of a batch norm that was trained."""
    changes = (
        (r"^quant_conv", "encoder.quant_conv"),
        (r"^post_quant_conv", "decoder.post_quant_conv"),
        (r"conv_norm_out", "norm_out"),
        (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    )
    renamed = {"bn.num_batches_tracked": np.array(7, np.int64)}
    for name, array in tensors.items():
        for pattern, replacement in changes:
            name = re.sub(pattern, replacement, name)
        is_product = "attn_1" in name and array.ndim == 2
        renamed[name] = array[..., None, None] if is_product else array
    return renamed


def test_the_autoencoder_in_black_forest_labs_names(folder, source):
    """Read it is the same model, and written it has the names and arrays it had."""
    diffusers = load_file(source / "vae" / "diffusion_pytorch_model.safetensors")
    expected = loaded(folder / "autoencoder")
    theirs = in_black_forest_labs_names(diffusers, len(expected.config.channels))
    tensors = ArrayTensors("ae.safetensors", theirs)
    assert vae_original.is_autoencoder(tensors)
    assert patched_vae_layout.is_patched(tensors)
    table = patched_vae_layout.original_table_of(expected.config)
    ours = flat_params(from_layout(table, tensors, expected.config, param_dtype=jnp.float32))
    for path, param in flat_params(expected).items():
        read = ours[path].get_value().astype(jnp.bfloat16)  # as the folder was converted
        np.testing.assert_array_equal(read.astype(jnp.float32), param.get_value(), path)
    del theirs["bn.num_batches_tracked"]  # which nothing reads
    written = in_layout(table, expected)
    assert written.keys() == theirs.keys()
    for name, array in written.items():
        exact = theirs[name].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(array, exact.astype(np.float32), name)


def inputs_at_700(golden):
    latents = nhwc(golden["latents"])
    return latents, jnp.full(len(latents), 700.0), jnp.asarray(golden["prompt_embeds"])


def test_forward(model, golden, said):
    inputs = inputs_at_700(golden)
    assert relative_error(tokens_of(model, inputs), golden["forward.t0.7"]) <= 1e-5
    warm = tokens_of(model, inputs, gamma=jnp.full(2, said["gamma"]))
    assert relative_error(warm, golden["forward.t0.7.gamma1.2"]) <= 1e-5
    assert relative_error(golden["forward.t0.7"], golden["forward.t0.7.gamma1.2"]) > 1e-3


def test_forward_on_the_tpu_kernel(adapted, train):
    """With the Pallas kernel, interpreted: a gamma per sample, and the LoRA."""
    options = {"gamma": jnp.asarray(train["gamma"]), "lora_scale": jnp.ones(2)}

    @partial(jax.jit, static_argnums=0)
    def velocity(graph, state, inputs):
        return nnx.merge(graph, state)(*inputs, **options, attention="pallas_interpret")

    ours = packed(velocity(*nnx.split(adapted), training_inputs(train)))
    assert relative_error(ours, train["velocity.gamma.lora"]) <= 1e-5


def training_inputs(train):
    """The noised latents and their conditioning; t is the noise level, 0 to 1."""
    sigma = jnp.asarray(train["t"])
    level = sigma[:, None, None, None]
    latents = (1 - level) * nhwc(train["x0"]) + level * nhwc(train["noise"])
    return latents, sigma * 1000, jnp.asarray(train["prompt_embeds"])


def test_gamma_per_sample(model, adapted, train):
    inputs, gamma = training_inputs(train), jnp.asarray(train["gamma"])
    assert len(set(train["gamma"].tolist())) == 2
    for name, ours in (
        ("velocity.gamma1", tokens_of(model, inputs)),
        ("velocity.gamma1", tokens_of(model, inputs, gamma=jnp.ones(2))),
        ("velocity.gamma", tokens_of(model, inputs, gamma=gamma)),
        # A LoRA that is loaded and off is no LoRA.
        ("velocity.gamma", tokens_of(adapted, inputs, gamma=gamma, lora_scale=jnp.zeros(2))),
        ("velocity.gamma.lora", tokens_of(adapted, inputs, gamma=gamma, lora_scale=jnp.ones(2))),
    ):
        assert relative_error(ours, train[name]) <= 1e-5, name


def test_loss_and_every_lora_gradient(adapted, train):
    inputs = training_inputs(train)
    target = nhwc(train["noise"]) - nhwc(train["x0"])

    def loss(transformer):
        velocity = transformer(*inputs, gamma=jnp.asarray(train["gamma"]), lora_scale=jnp.ones(2))
        return jnp.mean((velocity - target) ** 2)

    value, gradient = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, LoRAParam)))(
        adapted
    )
    assert relative_error(value, train["loss"][0]) <= 1e-5

    ours, _ = tensors_of(by_layer(gradient, adapted), flux2_diffusers.TABLE)
    theirs = {
        name.removeprefix("grad."): g for name, g in train.items() if name.startswith("grad.")
    }
    ours = {name.removeprefix("transformer."): g for name, g in ours.items()}
    assert ours.keys() == theirs.keys()
    assert len(theirs) == 44
    for name, expected in theirs.items():
        assert relative_error(ours[name], expected) <= 1e-4, name


@pytest.fixture(scope="module")
def tokenizer(folder, said) -> FolderTokenizer:
    return FolderTokenizer(folder / "tokenizer", said["text_tokens"], CHAT)


def test_token_ids(tokenizer, golden, said):
    np.testing.assert_array_equal(tokenizer(said["prompts"]), golden["input_ids"])
    np.testing.assert_array_equal(
        tokenizer([said["negative_prompt"]] * 2), golden["negative_input_ids"]
    )
    before, after = CHAT
    assert [f"{before}{prompt}{after}" for prompt in said["prompts"]] == said["chat_text"]


def test_text_encoder(folder, tokenizer, golden, said):
    text = Flux2Text(loaded(folder / "text_encoder"), pad_id=tokenizer.pad_id)
    graph, state = nnx.split(text)
    read = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens).txt)
    for name, prompts in (
        ("prompt_embeds", said["prompts"]),
        ("negative_prompt_embeds", [said["negative_prompt"]] * 2),
    ):
        assert relative_error(read(state, tokenizer(prompts)), golden[name]) <= 1e-5, name


def test_autoencoder(folder, golden):
    autoencoder = loaded(folder / "autoencoder")
    assert isinstance(autoencoder, PatchedVAE)
    images = nhwc(golden["vae.in"])
    for ours, name in zip(autoencoder.raw_moments(images), ("mean", "logvar"), strict=True):
        assert relative_error(ours, nhwc(golden[f"vae.{name}"])) <= 1e-5, name
    latents = autoencoder.encode(images)
    assert relative_error(latents, nhwc(golden["vae.latents"])) <= 1e-5
    assert relative_error(autoencoder.decode(latents), nhwc(golden["vae.decoded"])) <= 1e-5
    # The variance of the latents is divided as they are, by one number for each channel.
    raw = patchify(nhwc(golden["vae.logvar"]), 2)
    divided = packed(autoencoder.moments(images)[1]) - raw
    variance = autoencoder.latent_norm.variance[...] + EPSILON
    np.testing.assert_allclose(divided[0], -np.log(variance)[None].repeat(12, 0), atol=1e-4)


@pytest.fixture(scope="module")
def pipeline(folder):
    return tj.Flux2Pipeline.from_pretrained(folder, dtype="float32", param_dtype="float32")


def test_noise_levels(pipeline, golden, said):
    sizes = {"height": said["height"], "width": said["width"], "steps": said["steps"]}
    assert relative_error(pipeline.sigmas(**sizes), golden["sigmas"]) <= 1e-6
    assert relative_error(pipeline.timesteps(**sizes), golden["timesteps"]) <= 1e-6


@pytest.mark.parametrize("name", ["plain", "taca", "taca_lora"])
def test_trajectory_and_image(pipeline, golden, said, lora_file, name):
    taca = tj.TacaConfig(gamma=said["gamma"], first_steps=said["taca_steps"])
    pipeline.unload_lora()
    if name == "taca_lora":
        pipeline.load_lora(lora_file, gate="taca")
    out = pipeline(
        steps=said["steps"],
        guidance=said["guidance_scale"],
        latents=nhwc(golden["latents"]),
        prompt_embeds=golden["prompt_embeds"],
        negative_prompt_embeds=golden["negative_prompt_embeds"],
        taca=None if name == "plain" else taca,
        output="array",
        trajectory=True,
    )
    theirs = golden[f"{name}.trajectory"]
    ours = packed(out.trajectory.latents)
    assert len(ours) == len(theirs) == said["steps"]
    for step, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(found, expected) <= 2e-4, step
    assert relative_error(out.images[:1], nhwc(golden[f"{name}.image"])) <= 1e-3


def test_the_recorded_runs_differ_enough_to_tell_them_apart(golden):
    """So that no run passes for another within the tolerance of 2e-4."""
    plain, taca, lora = (golden[f"{n}.trajectory"][-1] for n in ("plain", "taca", "taca_lora"))
    assert relative_error(taca, plain) > 2e-3
    assert relative_error(lora, taca) > 2e-3


@pytest.mark.parametrize(
    ("config", "billions"),
    [(KLEIN_BASE_4B, 3.9), (KLEIN_BASE_9B, 9.1), (FLUX2_DEV, 32.2)],
    ids=["klein-4B", "klein-9B", "dev"],
)
def test_full_size_has_exactly_the_parameters_of_the_original(config, billions):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", minversion="0.37")
    with torch.device("meta"):
        theirs = diffusers.Flux2Transformer2DModel(**arguments(config))
    given = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert layout_shapes(flux2_diffusers.TABLE, config) == given
    count = sum(math.prod(shape) for shape in shapes_of(config).values())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e9, 1) == billions


def arguments(config: Flux2Config) -> dict:
    """What diffusers' class takes for a config."""
    settings = flux2_diffusers.settings_of(config)
    return {name: value for name, value in settings.items() if not name.startswith("_")}


@pytest.mark.parametrize(("ours", "layers"), [(QWEN3_4B, 36), (QWEN3_8B, 36)])
def test_full_size_text_encoders_are_the_originals_up_to_what_is_read(ours, layers):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=ours.vocab_size,
        hidden_size=ours.dim,
        intermediate_size=ours.ff_dim,
        num_hidden_layers=layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
    )
    with torch.device("meta"):
        theirs = transformers.Qwen3Model(config)
    table = qwen3_layout.table_of(ours)
    given = {
        f"model.{name}": tuple(tensor.shape)
        for name, tensor in theirs.state_dict().items()
        if not table.is_ignored(f"model.{name}")
    }
    assert layout_shapes(table, ours) == given


def test_the_full_size_autoencoder_has_exactly_the_parameters_of_the_original():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", minversion="0.37")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLFlux2()
    given = {
        name: tuple(tensor.shape)
        for name, tensor in theirs.state_dict().items()
        if not patched_vae_layout.TABLE.is_ignored(name)
    }
    assert layout_shapes(patched_vae_layout.TABLE, FLUX2_VAE) == given


def in_diffusers(model: Flux2Transformer, folder):
    """diffusers' model of our weights, exported by the command to a folder that it loads itself."""
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", minversion="0.37")
    save_model(folder / "ours", model)
    main(["export", "--src", str(folder / "ours"), "--dst", str(folder / "theirs")])
    return diffusers.Flux2Transformer2DModel.from_pretrained(folder / "theirs").eval()


def diffusers_velocity(theirs, inputs, guidance=None) -> np.ndarray:
    import torch

    latents, timestep, txt = inputs
    _, height, width, _ = latents.shape
    ids = np.zeros((height, width, 4), np.float32)
    ids[..., 1] = np.arange(height)[:, None]
    ids[..., 2] = np.arange(width)
    txt_ids = np.zeros((txt.shape[1], 4), np.float32)
    txt_ids[:, 3] = np.arange(txt.shape[1])
    with torch.no_grad():
        return theirs(
            hidden_states=torch.tensor(packed(latents)),
            timestep=torch.tensor(np.asarray(timestep) / 1000),
            encoder_hidden_states=torch.tensor(np.asarray(txt)),
            guidance=None if guidance is None else torch.tensor(np.asarray(guidance)),
            txt_ids=torch.tensor(txt_ids),
            img_ids=torch.tensor(ids.reshape(-1, 4)),
            return_dict=False,
        )[0].numpy()


def random_inputs():
    keys = jax.random.split(jax.random.key(1), 2)
    return (
        jax.random.normal(keys[0], (2, 3, 4, FLUX2.latent_channels)),
        jnp.array([250.0, 990.0]),
        jax.random.normal(keys[1], (2, 5, FLUX2.txt_dim)),
    )


@pytest.mark.parametrize("guidance_embed", [True, False], ids=["dev", "klein"])
def test_exported_weights_compute_the_same_in_diffusers(tmp_path, guidance_embed):
    model, inputs = random_model(replace(FLUX2, guidance_embed=guidance_embed)), random_inputs()
    guidance = jnp.array([1.0, 4.0]) if guidance_embed else None
    expected = diffusers_velocity(in_diffusers(model, tmp_path), inputs, guidance)
    assert relative_error(tokens_of(model, inputs, guidance=guidance), expected) <= 1e-5


def test_a_lora_of_ours_does_the_same_in_diffusers(tmp_path):
    pytest.importorskip("peft")
    model, inputs = random_model(FLUX2), random_inputs()
    theirs = in_diffusers(model, tmp_path)
    plain = diffusers_velocity(theirs, inputs)
    # Every linear layer, final_mod among them, whose halves diffusers stores the other way round;
    # alpha is not the rank.
    add_lora(model, LoRAConfig(rank=4, alpha=6.0), (r".*",), rngs=nnx.Rngs(2))
    randomise(model, LoRAParam, scale=0.1)
    write_lora(tmp_path / "lora.safetensors", model)
    theirs.load_lora_adapter(tmp_path / "lora.safetensors")
    expected = diffusers_velocity(theirs, inputs)
    ours = tokens_of(model, inputs, lora_scale=jnp.ones(2))
    assert relative_error(expected, plain) > 0.05
    assert relative_error(ours, expected) <= 1e-5
