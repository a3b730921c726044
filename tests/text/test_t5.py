"""T5 encoder: against transformers' T5EncoderModel, and what it has to be on its own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.nn.kinds import abstract_model, flat_params
from taca_jax.text.t5 import T5_XXL, T5Config, T5Encoder, relative_position_bucket
from taca_jax.text.t5_layout import TABLE
from tests.compare import relative_error
from tests.models import from_layout
from tests.random_models import random_model

TINY = T5Config(
    vocab_size=97,
    dim=24,
    ff_dim=40,
    num_heads=3,
    head_dim=10,
    num_layers=3,
    relative_buckets=16,
    relative_max_distance=32,
)


def original(config: T5Config, device: str = "cpu"):
    """transformers' encoder of the same sizes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device(device):
        return transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.head_dim,
                d_ff=config.ff_dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.relative_buckets,
                relative_attention_max_distance=config.relative_max_distance,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        ).eval()


@nnx.jit
def run(model: T5Encoder, tokens, mask=None):
    return model(tokens, mask)


@pytest.fixture(scope="module")
def pair():
    """A tiny original with every parameter perturbed, and ours with its weights."""
    torch = pytest.importorskip("torch")
    theirs = original(TINY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in theirs.parameters():
            param.add_(0.3 * torch.randn(param.shape, generator=generator))
    weights = {key: w.numpy() for key, w in theirs.state_dict().items()}
    return theirs, from_layout(TABLE, weights, TINY)


@pytest.mark.parametrize("length", [1, 7, 70])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_transformers(pair, length, masked):
    """70 tokens: far above relative_max_distance = 32."""
    import torch

    theirs, ours = pair
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, TINY.vocab_size, (2, length))
    mask = np.arange(length)[None] < np.array([[length], [max(1, length // 2)]])
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.as_tensor(tokens),
            attention_mask=torch.as_tensor(mask) if masked else None,
        ).last_hidden_state.numpy()
    got = run(ours, jnp.asarray(tokens), jnp.asarray(mask) if masked else None)
    assert got.dtype == jnp.float32
    assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 32), (8, 20), (4, 3)])
def test_buckets_match_transformers_exactly(num_buckets, max_distance):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-1500, 1501)
    expected = T5Attention._relative_position_bucket(
        torch.as_tensor(distance), num_buckets=num_buckets, max_distance=max_distance
    ).numpy()
    got = relative_position_bucket(distance, num_buckets, max_distance)
    np.testing.assert_array_equal(got, expected)


def test_xxl_has_exactly_the_parameters_of_the_original():
    theirs = original(T5_XXL, "meta")
    given = {
        name: tuple(tensor.shape)
        for name, tensor in theirs.state_dict().items()
        if not TABLE.is_ignored(name)
    }
    params = flat_params(abstract_model(T5_XXL, dtype=jnp.float32))
    pieces = TABLE.pieces({path: param.shape for path, param in params.items()})
    assert {piece.key: piece.shape for piece in pieces} == given
    count = sum(int(np.prod(param.shape)) for param in params.values())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e9, 2) == 4.76


def test_masked_tokens_do_not_matter(pair):
    _, ours = pair
    mask = jnp.arange(9)[None] < 5
    tokens = jnp.arange(9)[None]
    changed = jnp.where(mask, tokens, 50 + tokens)
    np.testing.assert_array_equal(run(ours, tokens, mask)[:, :5], run(ours, changed, mask)[:, :5])
    assert relative_error(run(ours, tokens)[:, :5], run(ours, changed)[:, :5]) > 1e-3


def test_bfloat16_stays_close_and_finite_with_a_huge_residual_stream():
    tokens = jnp.arange(20)[None]
    high, low = random_model(TINY), random_model(TINY, dtype=jnp.bfloat16)
    assert run(low, tokens).dtype == jnp.bfloat16
    assert relative_error(run(low, tokens), run(high, tokens)) < 0.02
    for model in (high, low):
        model.token_embed.embedding.set_value(model.token_embed.embedding.get_value() * 1e6)
    assert relative_error(run(low, tokens), run(high, tokens)) < 0.02


def test_all_layers_are_one_trace(pair):
    _, ours = pair
    graph, state = nnx.split(ours)
    text = str(jax.make_jaxpr(lambda s, t: nnx.merge(graph, s)(t))(state, jnp.zeros((1, 4), int)))
    assert len(re.findall(r"\bscan\[", text)) == 1
    assert text.count("tanh") == 1


def test_remat_gives_the_same_gradients(pair):
    _, ours = pair
    tokens = jnp.arange(8)[None]

    def gradient(remat):
        return nnx.jit(nnx.grad(lambda model: jnp.sum(model(tokens, remat=remat) ** 3)))(ours)

    plain, again = jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient("full"))
    for a, b in zip(plain, again, strict=True):
        assert np.linalg.norm(a) > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.abs(a).max()))


def test_initialisation_has_unit_scale_logits_and_differs_between_layers():
    config = T5Config(vocab_size=64, dim=256, ff_dim=512, num_heads=4, head_dim=64, num_layers=2)
    model = T5Encoder(config, rngs=nnx.Rngs(0))
    q = model.blocks.attn.q.kernel.get_value()
    assert q.shape == (2, 256, 256)
    assert not np.array_equal(q[0], q[1])
    expected = {
        "blocks.attn.q.kernel": (256 * 64) ** -0.5,
        "blocks.attn.k.kernel": 256**-0.5,
        "blocks.attn.o.kernel": 256**-0.5,
        "blocks.ff.wo.kernel": 512**-0.5,
        "token_embed.embedding": 1.0,
    }
    flat = {".".join(path): param for path, param in nnx.to_flat_state(nnx.state(model))}
    for path, std in expected.items():
        assert np.std(flat[path].get_value()) == pytest.approx(std, rel=0.05), path


def test_unusable_buckets_are_refused():
    with pytest.raises(ValueError, match="relative_buckets=2"):
        T5Config(97, 24, 40, 3, 10, 3, relative_buckets=2)
