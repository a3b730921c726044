"""One optimizer step: what it changes, what it does not, and what its gradient is of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.families.flux.model import FLUX_KIND, FluxTransformer
from taca_jax.families.flux.text import FluxText
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.nn.quantization import quantize
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.taca import TacaConfig
from taca_jax.text.clip import CLIPConfig
from taca_jax.text.t5 import T5_KIND
from taca_jax.training.losses import flow_matching_loss, interpolate, sample_timesteps
from taca_jax.training.models import TextToImage
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.step import Batch, make_trainer, objective
from tests.random_models import random_model
from tests.training.tiny import arrays, tiny_config, tiny_pipeline

TACA = TacaConfig(gamma=1.5, threshold=900)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, ema_decay=0.5)


def make(config, *, seed=0):
    """(trainer, state, model), all arrays its own: steps consume the state."""
    pipeline = tiny_pipeline(seed=seed)
    quantize(pipeline.transformer, FLUX_KIND, config.quantize)
    quantize(pipeline.text_encoder.t5, T5_KIND, config.quantize_text)
    if config.lora is not None:
        add_lora(pipeline.transformer, config.lora, ATTENTION_TARGETS, rngs=nnx.Rngs(1))
    model = TextToImage(pipeline.transformer, pipeline.text_encoder)
    trainer, trained = make_trainer(config, model, pipeline.autoencoder)
    state = trainer.begin(trained)
    return trainer, jax.tree.map(jnp.copy, state), model


def make_batch(parts=1, size=2, seed=0):
    image = jax.random.randint(jax.random.key(seed), (parts, size, 40, 40, 3), 0, 256)
    tokens = jax.random.randint(jax.random.key(seed + 1), (parts, size, 16), 1, 33)
    return Batch(image=image.astype(jnp.uint8), tokens=tokens)


def config_for(**changes):
    return tiny_config("unused", **({"optimizer": OPTIMIZER} | changes))


def lora_config(**changes):
    adapt = {"base": "unused", "model": None, "lora": LoRAConfig(rank=2, alpha=2), "taca": TACA}
    return config_for(**(adapt | changes))


@pytest.fixture(scope="module")
def scratch():
    return make(config_for())


@pytest.fixture(scope="module")
def adapter():
    return make(lora_config())


@nnx.jit(static_argnames="config")
def loss_of(model, x0, tokens, rng, *, config):
    return objective(config, model, x0, model.text_encoder(tokens), rng)[0]


def own(state):
    return jax.tree.map(jnp.copy, state)


def run(trainer, state, batches):
    """The state and metrics after a step on each batch; `state` stays usable."""
    state, metrics = own(state), []
    for batch in batches:
        state, measured = trainer.run(state, batch)
        metrics.append({name: float(value) for name, value in measured.items()})
    return state, metrics


def test_training_from_scratch_moves_every_parameter(scratch):
    trainer, start, _ = scratch
    end, _ = run(trainer, start, [make_batch(seed=s) for s in range(3)])
    before, after = arrays(start.trained), arrays(end.trained)
    assert before.keys() == after.keys()
    still = [name for name in before if np.array_equal(before[name], after[name])]
    assert not still
    assert not jax.tree.leaves(trainer.frozen.model)
    assert end.step == 3


@pytest.fixture(scope="module")
def on_nf4():
    return make(lora_config(quantize="nf4", quantize_text="int8"))


@pytest.mark.parametrize("made", ["adapter", "on_nf4"])
def test_lora_training_changes_lora_factors_alone(made, request):
    trainer, start, model = request.getfixturevalue(made)
    frozen = {name: np.array(value) for name, value in arrays(trainer.frozen.model).items()}
    end, metrics = run(trainer, start, [make_batch(seed=s) for s in range(4)])
    for name, value in arrays(trainer.frozen.model).items():
        assert np.array_equal(value, frozen[name]), name
    base = arrays(nnx.state(model, nnx.Not(nnx.OfType(LoRAParam))))
    trained = trainer.merge(end.best)
    after = arrays(nnx.state(trained, nnx.Not(nnx.OfType(LoRAParam))))
    assert base.keys() == after.keys()
    assert all(np.array_equal(base[name], after[name]) for name in base)
    before, after = arrays(start.trained), arrays(end.trained)
    assert all("lora_" in name for name in before)
    assert len(before) == 2 * (2 * 4 + 4)
    assert not [name for name in before if np.array_equal(before[name], after[name])]
    assert all(metric["gradient_norm"] > 0 for metric in metrics)


@pytest.mark.slow
@pytest.mark.parametrize(("to", "limit"), [("int8", 1e-3), ("nf4", 2e-2)])
def test_the_loss_falls_on_a_quantised_base_as_on_the_base_itself(to, limit):
    def losses(quantization):
        rate = OptimizerConfig(learning_rate=1e-2)
        config = lora_config(quantize=quantization, optimizer=rate, remat="full")
        trainer, start, _ = make(config)
        _, metrics = run(trainer, start, [make_batch()] * 60)
        return np.array([metric["loss"] for metric in metrics])

    base, ours = losses("none"), losses(to)
    print(to, *(f"{np.mean(x[:10]):.4f} -> {np.mean(x[-10:]):.4f}" for x in (base, ours)))
    for each in (base, ours):
        assert np.mean(each[-10:]) < 0.8 * np.mean(each[:10])
    assert abs(np.mean(ours[-10:]) / np.mean(base[-10:]) - 1) < limit


def test_at_first_only_b_has_a_gradient(adapter):
    trainer, start, _ = adapter
    end, _ = run(trainer, start, [make_batch()])
    before, after = arrays(start.trained), arrays(end.trained)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_b" in name}


def test_the_objective_is_the_papers(adapter):
    """Equations 11 to 13, put together by hand."""
    _, _, model = adapter
    batch, rng = make_batch(), jax.random.key(3)
    x0 = batch.image[0].astype(jnp.float32) / 127.5 - 1
    config = lora_config(timestep_sampling="uniform")
    found = loss_of(model, x0, batch.tokens[0], rng, config=config)
    time_rng, noise_rng = jax.random.split(rng)
    timestep = sample_timesteps(time_rng, 2, sampling="uniform", above=TACA.threshold)
    assert (timestep > TACA.threshold).all()
    noise = jax.random.normal(noise_rng, x0.shape)
    text = model.text_encoder(batch.tokens[0])
    velocity = nnx.jit(FluxTransformer.__call__)(
        model.transformer,
        interpolate(x0, noise, timestep),
        timestep,
        text.txt,
        text.pooled,
        gamma=jnp.full(2, TACA.gamma),
        lora_scale=jnp.ones(2),
    )
    np.testing.assert_allclose(found, flow_matching_loss(velocity, x0, noise), rtol=1e-5)
    untempered = dataclasses.replace(config, taca=None)
    plain = loss_of(model, x0, batch.tokens[0], rng, config=untempered)
    assert abs(float(plain) - float(found)) > 1e-3


def test_the_step_number_decides_the_noise(scratch):
    trainer, start, _ = scratch
    batch = make_batch()
    _, (first,) = run(trainer, start, [batch])
    _, (again,) = run(trainer, start, [batch])
    later = dataclasses.replace(start, step=start.step + 1)
    _, (other,) = run(trainer, later, [batch])
    assert first == again
    assert first["loss"] != other["loss"]


def test_the_loss_falls_on_a_few_pictures(scratch):
    trainer, start, _ = scratch
    end, metrics = run(trainer, start, [make_batch()] * 40)
    losses = [metric["loss"] for metric in metrics]
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5])
    assert end.step == 40


def test_two_parts_are_the_mean_of_each_with_its_key():
    """Accumulating a parts is one step on the mean of the parts' losses, part i with key i."""
    config = config_for(grad_accumulation=2, optimizer=OptimizerConfig(clip_norm=None))
    trainer, start, model = make(config)
    batch = make_batch(parts=2)
    _, (metrics,) = run(trainer, start, [batch])
    graph, trained = nnx.split(model)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0), 2)

    @jax.jit
    @jax.value_and_grad
    def part_loss(trained, i):
        x0 = batch.image[i].astype(jnp.float32) / 127.5 - 1
        model = nnx.merge(graph, trained)
        text = model.text_encoder(batch.tokens[i])
        return objective(config, model, x0, text, keys[i])[0]

    losses, gradients = zip(*(part_loss(trained, i) for i in range(2)), strict=True)
    leaves = zip(*map(jax.tree.leaves, gradients), strict=True)
    norm = np.sqrt(sum(float((((a + b) / 2) ** 2).sum()) for a, b in leaves))
    np.testing.assert_allclose(metrics["loss"], (losses[0] + losses[1]) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)


def test_the_average_follows_slowly(scratch):
    trainer, start, _ = scratch
    assert arrays(start.best).keys() == arrays(start.trained).keys()
    end, _ = run(trainer, start, [make_batch()])
    # (1 + 0) / (10 + 0) of the old is kept in the first step, however long the memory is.
    for name, value in arrays(end.average).items():
        expected = 0.1 * arrays(start.average)[name] + 0.9 * arrays(end.trained)[name]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    assert end.best is end.average
    trainer, start, _ = make(config_for(optimizer=OptimizerConfig()))
    assert start.average is None
    assert start.best is start.trained


def test_recomputing_activations_changes_nothing(scratch):
    pipeline = tiny_pipeline()
    pipeline.transformer.remat = "full"
    model = TextToImage(pipeline.transformer, pipeline.text_encoder)
    config = config_for(remat="full")
    trainer, trained = make_trainer(config, model, pipeline.autoencoder)
    state = trainer.begin(trained)
    _, (again,) = run(trainer, state, [make_batch()])
    trainer, start, _ = scratch
    assert trainer.merge(start.trained).transformer.remat == "none"
    _, (kept,) = run(trainer, start, [make_batch()])
    np.testing.assert_allclose(again["loss"], kept["loss"], rtol=1e-6)
    np.testing.assert_allclose(again["gradient_norm"], kept["gradient_norm"], rtol=1e-5)


def test_a_gradient_is_clipped_and_its_norm_reported_as_it_was():
    clip = OptimizerConfig(learning_rate=1.0, clip_norm=1e-12, b1=0.0, b2=0.0)
    trainer, start, _ = make(lora_config(optimizer=clip))
    end, (metrics,) = run(trainer, start, [make_batch()])
    assert metrics["gradient_norm"] > 1e-2
    for name, value in arrays(end.trained).items():  # against Adam's epsilon nothing is left
        np.testing.assert_allclose(value, arrays(start.trained)[name], atol=1e-3, err_msg=name)


def test_embedded_guidance_reaches_the_model():
    flux = dataclasses.replace(config_for().model, guidance_embed=True)
    pipeline = tiny_pipeline(flux)
    model = TextToImage(pipeline.transformer, pipeline.text_encoder)
    batch = make_batch()
    x0 = batch.image[0].astype(jnp.float32) / 127.5 - 1
    rng, tokens = jax.random.key(0), batch.tokens[0]
    losses = [
        float(loss_of(model, x0, tokens, rng, config=config_for(guidance=guidance)))
        for guidance in (1.0, 4.0)
    ]
    assert losses[0] != losses[1]


def test_a_model_that_reads_with_clip_and_t5_trains():
    """Traced alone: the ids of both stand side by side, as their tokenizer joins them."""
    pipeline = tiny_pipeline()
    clip = CLIPConfig(33, 4, 32, 32, 2, 1, "quick_gelu", None, None)
    text = FluxText(random_model(clip), pipeline.text_encoder.t5)
    graph, state = nnx.split(TextToImage(pipeline.transformer, text))

    def loss(state, x0, tokens):
        model = nnx.merge(graph, state)
        text = model.text_encoder(tokens)
        return objective(config_for(), model, x0, text, jax.random.key(0))[0]

    x0, tokens = jnp.zeros((2, 40, 40, 3)), jnp.zeros((2, 4 + 16), int)
    assert jax.eval_shape(jax.grad(loss), state, x0, tokens) == jax.eval_shape(lambda: state)


def test_a_trainer_is_made_on_its_mesh():
    """What compiles for the devices of another mesh would be told nothing of this one's."""
    config, pipeline = lora_config(), tiny_pipeline()
    model = TextToImage(pipeline.transformer, pipeline.text_encoder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(ValueError, match="must be the current one"):
        make_trainer(config, model, pipeline.autoencoder, mesh)
