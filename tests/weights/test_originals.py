"""Original weights as models, straight from their files; what they are recognised by."""

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.families.flux.family import FLUX as FLUX_FAMILY
from taca_jax.families.flux2.family import FLUX2 as FLUX2_FAMILY
from taca_jax.families.registry import families
from taca_jax.families.sd3.family import SD3 as SD3_FAMILY
from taca_jax.formats.tensor_files import TensorFiles, open_tensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.text import clip_layout
from taca_jax.weights import loading
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.originals import Original, family_in, transformer, vae
from tests.models import CLIP, LAYOUTS, in_layout
from tests.random_models import random_model


@pytest.fixture
def original(request, tmp_path):
    """A file in a layout, and the model that was written to it."""
    table, config = LAYOUTS[request.param]
    model = random_model(config)
    write_tensors(tmp_path / "x.safetensors", in_layout(table, model))
    return Original(table, config, open_tensors(tmp_path / "x.safetensors")), model


@pytest.mark.parametrize("original", LAYOUTS, indirect=True)
@pytest.mark.parametrize("param_dtype", [None, jnp.bfloat16])
def test_it_is_the_model_that_was_written(original, param_dtype):
    source, model = original
    options = LoadOptions(dtype=jnp.bfloat16, param_dtype=param_dtype)
    again = source.load(options)
    assert again.config == model.config
    params = flat_params(again)
    for path, param in flat_params(model).items():
        expected = param.get_value().astype(param_dtype or param.dtype)
        assert params[path].dtype == expected.dtype
        np.testing.assert_array_equal(params[path].get_value(), expected, path)


@pytest.mark.parametrize("original", ["flux, Black Forest Labs", "sd3"], indirect=True)
def test_a_stack_is_read_a_layer_at_a_time_and_everything_once(original, monkeypatch):
    source, _ = original
    monkeypatch.setattr(loading, "AT_ONCE", 0)
    read = {}

    def counted(tensors, name, *part):
        made = read_part(tensors, name, *part)
        read[name] = read.get(name, 0) + made.size
        return made

    read_part = TensorFiles.read
    monkeypatch.setattr(TensorFiles, "read", counted)
    source.load(LoadOptions(dtype=jnp.float32))
    sizes = {name: int(np.prod(shape)) for name, shape in source.tensors.shapes.items()}
    assert read == sizes


@pytest.mark.parametrize("original", ["t5"], indirect=True)
def test_what_does_not_fit_is_said_before_anything_is_read(original, monkeypatch):
    source, _ = original
    source = Original(clip_layout.TABLE, CLIP, source.tensors)
    monkeypatch.setattr(TensorFiles, "read", None)
    with pytest.raises(UserError, match=r"x\.safetensors is not a CLIP text encoder .*missing: "):
        source.load(LoadOptions(dtype=jnp.float32))


@pytest.mark.parametrize(
    ("original", "family"),
    [
        ("flux, Black Forest Labs", FLUX_FAMILY),
        ("sd3, Stability AI", SD3_FAMILY),
        ("flux2, Black Forest Labs", FLUX2_FAMILY),
    ],
    indirect=["original"],
)
def test_a_file_tells_its_family(original, family):
    source, _ = original
    assert family_in(source.tensors) == (family, source.tensors)
    others = [each for each in families() if each is not family]
    assert family_in(source.tensors, others) is None


@pytest.mark.parametrize("original", ["t5"], indirect=True)
def test_files_of_nothing_that_is_asked_for(original, tmp_path):
    file = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"holds no transformer that is known .*: it has encoder"):
        transformer(file)
    with pytest.raises(UserError, match="is no Stable Diffusion 3 in Stability AI's names: it has"):
        transformer(file, SD3_FAMILY)
    with pytest.raises(UserError, match="is no autoencoder in the original's names: it has"):
        vae(file)
