"""CLIP text encoders: against transformers, through the converter, and at full size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.convert.cli import main
from taca_jax.errors import UserError
from taca_jax.nn.kinds import abstract_model, flat_params
from taca_jax.text import clip_layout as clip_format
from taca_jax.text.clip import CLIP_BIGG, CLIP_L, CLIPConfig, CLIPTextEncoder
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from tests.compare import relative_error
from tests.random_models import random_model

TINY = CLIPConfig(
    vocab_size=97,
    max_tokens=12,
    dim=24,
    ff_dim=40,
    num_heads=3,
    num_layers=3,
    activation="quick_gelu",
    projection_dim=10,
    end_token=None,
)
LEGACY_END = 2


def original(config: CLIPConfig, device: str = "cpu"):
    """transformers' encoder of the same sizes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    projected = config.projection_dim is not None
    with torch.device(device):
        settings = transformers.CLIPTextConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_tokens,
            hidden_size=config.dim,
            intermediate_size=config.ff_dim,
            num_attention_heads=config.num_heads,
            num_hidden_layers=config.num_layers,
            hidden_act=config.activation,
            projection_dim=config.projection_dim if projected else 4,
            bos_token_id=0,
            eos_token_id=LEGACY_END if config.end_token is None else config.end_token,
        )
        kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        return getattr(transformers, kind)(settings).eval()


def perturbed(config: CLIPConfig):
    """The original with random numbers of a size that matters in every parameter."""
    import torch

    torch.manual_seed(0)
    theirs = original(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in theirs.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=generator))
    return theirs


@nnx.jit
def run(model: CLIPTextEncoder, tokens):
    return model(tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "end_token": 5},
        {"projection_dim": None, "num_layers": 1, "end_token": 5},
    ],
    ids=["quick_gelu", "gelu", "unprojected"],
)
def test_matches_transformers_through_the_converter(tmp_path, changes):
    import torch

    config = CLIPConfig(**{**TINY.__dict__, **changes})
    theirs = perturbed(config)
    theirs.save_pretrained(tmp_path / "src")
    main(["clip", "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "dst")])
    ours = load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32))
    assert ours.config == config
    # Ids at random, two end tokens in one row, the highest id at different places.
    tokens = np.random.default_rng(0).integers(6, 90, (3, config.max_tokens))
    tokens[0, [4, 9]], tokens[1, 7], tokens[2, 1] = 5, 5, 5
    tokens[0, [3, 8]], tokens[1, 2], tokens[2, 11] = 96, 96, 96
    with torch.no_grad():
        out = theirs(torch.as_tensor(tokens), output_hidden_states=True)
        text_model = getattr(theirs, "text_model", theirs)
        pooled = text_model(torch.as_tensor(tokens)).pooler_output
    got = run(ours, jnp.asarray(tokens))
    assert relative_error(got.last, out.last_hidden_state) <= 1e-5
    assert relative_error(got.penultimate, out.hidden_states[-2]) <= 1e-5
    assert relative_error(got.pooled, pooled) <= 1e-5
    if config.projection_dim is None:
        assert got.projected is None
    else:
        assert relative_error(got.projected, out.text_embeds) <= 1e-5


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (CLIP_L, 123.65),
        (CLIPConfig(**{**CLIP_L.__dict__, "projection_dim": None}), 123.06),
        (CLIP_BIGG, 694.66),
    ],
    ids=["L", "L unprojected", "bigG"],
)
def test_full_size_has_exactly_the_parameters_of_the_original(config, millions):
    theirs = original(config, "meta")
    given = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    params = flat_params(abstract_model(config, dtype=jnp.float32))
    # transformers 5 has no prefix without a projection; the released files have it always.
    prefix = "" if config.projection_dim is not None else clip_format.PREFIX
    pieces = clip_format.TABLE.pieces({path: param.shape for path, param in params.items()})
    assert {piece.key: piece.shape for piece in pieces} == {
        prefix + name: shape for name, shape in given.items()
    }
    count = sum(int(np.prod(param.shape)) for param in params.values())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e6, 2) == millions


def test_later_tokens_do_not_matter():
    model = random_model(TINY)
    tokens = jnp.arange(36).reshape(3, 12)
    changed = tokens.at[:, 6:].add(40)
    one, other = run(model, tokens), run(model, changed)
    np.testing.assert_array_equal(one.last[:, :6], other.last[:, :6])
    assert relative_error(one.last[:, 6:], other.last[:, 6:]) > 1e-2


def test_bfloat16_stays_close():
    tokens = jnp.arange(36).reshape(3, 12)
    high, low = random_model(TINY), random_model(TINY, dtype=jnp.bfloat16)
    for name in ("last", "penultimate", "pooled", "projected"):
        one, other = getattr(run(low, tokens), name), getattr(run(high, tokens), name)
        assert one.dtype == jnp.bfloat16
        assert relative_error(one, other) < 0.02, name


def test_all_layers_are_one_trace():
    graph, state = nnx.split(random_model(TINY))
    text = str(jax.make_jaxpr(lambda s, t: nnx.merge(graph, s)(t))(state, jnp.zeros((1, 4), int)))
    assert len(re.findall(r"\bscan\[", text)) == 1
    assert len(re.findall(r"\blogistic\b", text)) == 1


def test_too_many_tokens_and_heads_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="13 tokens a prompt; this CLIP has 12 positions"):
        random_model(TINY)(jnp.zeros((1, 13), int))
    with pytest.raises(UserError, match="num_heads is 5; it must divide the width of 24"):
        CLIPConfig(**{**TINY.__dict__, "num_heads": 5})


def test_a_fresh_one_is_of_the_scale_of_the_original():
    config = CLIPConfig(**{**TINY.__dict__, "dim": 192, "ff_dim": 256})
    params = flat_params(nnx.jit(lambda: CLIPTextEncoder(config, rngs=nnx.Rngs(0)))())
    expected = {
        "token_embed.embedding": 0.02,
        "position_embed.embedding": 0.01,
        "blocks.attn.q.kernel": 192**-0.5,
        "blocks.attn.o.kernel": 192**-0.5 * 6**-0.5,
        "blocks.ff.wi.kernel": 384**-0.5,
        "projection.kernel": 192**-0.5,
    }
    for path, std in expected.items():
        assert np.std(params[path].get_value()) == pytest.approx(std, rel=0.05), path
