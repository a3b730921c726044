"""Black Forest Labs' own files, through `python -m convert`: the same outputs and tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from taca_jax.autoencoders import vae_original as vae_bfl
from taca_jax.convert.cli import main
from taca_jax.families.flux import bfl as flux_bfl
from taca_jax.families.flux.family import FLUX_VAE
from taca_jax.families.sd3.family import SD3_VAE
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.layers import unpatchify
from taca_jax.weights.folders import load_config, load_model
from taca_jax.weights.loading import LoadOptions
from tests.compare import relative_error
from tests.golden import nhwc
from tests.models import in_layout
from tests.parity.test_flux import tokens_of
from tests.shared import shared_path


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(shared_path("golden/flux_bfl/golden.safetensors"))


def converted(src, dst, *words) -> str:
    main(["flux", "--src", str(src), "--dst", str(dst), *words])
    return str(dst)


def test_velocity(tmp_path, golden):
    src = shared_path("golden/flux_bfl/flux1-dev.safetensors")
    model = load_model(
        converted(src, tmp_path / "x"), LoadOptions(dtype=jnp.float32, param_dtype=jnp.float32)
    )
    latents = unpatchify(jnp.asarray(golden["img"]), 2, 12, 18)  # a grid of 6 x 9 tokens
    inputs = (
        latents,
        jnp.asarray(golden["t"]) * 1000,
        jnp.asarray(golden["txt"]),
        jnp.asarray(golden["y"]),
    )
    ours = tokens_of(model, inputs, guidance=jnp.asarray(golden["guidance"]))
    assert relative_error(ours, golden["velocity"]) <= 1e-5
    # What is exported again is the file.
    stored = load_model(tmp_path / "x", LoadOptions(dtype=jnp.float32))
    same_tensors(in_layout(flux_bfl.TABLE, stored), open_tensors(src))


def test_decoded_picture(tmp_path, golden):
    src = shared_path("golden/flux_bfl/ae.safetensors")
    model = load_model(
        converted(src, tmp_path / "x"), LoadOptions(dtype=jnp.float32, param_dtype=jnp.float32)
    )
    assert model.config.scaling_factor == FLUX_VAE.scaling_factor
    assert model.config.channels == (32, 64, 128, 128)
    graph, state = nnx.split(model)
    decode = jax.jit(lambda state, z: nnx.merge(graph, state).decode(z))
    assert relative_error(decode(state, nhwc(golden["z"])), nhwc(golden["decoded"])) <= 1e-5
    stored = load_model(tmp_path / "x", LoadOptions(dtype=jnp.float32))
    same_tensors(in_layout(vae_bfl.table_of(stored.config), stored), open_tensors(src))


def same_tensors(ours, theirs) -> None:
    assert {name: array.shape for name, array in ours.items()} == dict(theirs.shapes)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs.read(name), name)


def test_files_with_prefixes(tmp_path, capsys):
    """ComfyUI's whole checkpoints: the models that are known, and what is left out is said."""
    tensors = open_tensors(shared_path("golden/flux_bfl/flux1-dev.safetensors"))
    arrays = {f"model.diffusion_model.{name}": tensors.read(name) for name in tensors.shapes}
    ae = open_tensors(shared_path("golden/flux_bfl/ae.safetensors"))
    arrays |= {f"vae.{name}": ae.read(name) for name in ae.shapes}
    arrays["model_ema.decay"] = np.zeros(1, np.float32)
    write_tensors(tmp_path / "all.safetensors", arrays)
    converted(tmp_path / "all.safetensors", tmp_path / "x")
    assert "left out: 1 other tensors: model_ema.decay" in capsys.readouterr().out
    stored = load_model(tmp_path / "x" / "transformer", LoadOptions(dtype=jnp.float32))
    same_tensors(in_layout(flux_bfl.TABLE, stored), tensors)
    stored = load_model(tmp_path / "x" / "autoencoder", LoadOptions(dtype=jnp.float32))
    assert stored.config.shift_factor == FLUX_VAE.shift_factor
    same_tensors(in_layout(vae_bfl.table_of(stored.config), stored), ae)

    words = ["vae", "--src", str(tmp_path / "all.safetensors"), "--dst", str(tmp_path / "y")]
    main([*words, "--latents", "sd3"])
    assert load_config(tmp_path / "y").shift_factor == SD3_VAE.shift_factor
    with pytest.raises(SystemExit, match="does not say how its latents are scaled; give latents"):
        main(["vae", "--src", str(tmp_path / "all.safetensors"), "--dst", str(tmp_path / "z")])
