"""The configurations: what is refused, what the optimizer does, and that every field is read."""

import ast
import dataclasses
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from taca_jax.autoencoders.pixels import PixelsConfig
from taca_jax.config.fields import difference, fields_of, update
from taca_jax.config.json_text import from_json, to_json
from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.evaluation.attention_maps.config import AttentionConfig
from taca_jax.evaluation.compbench.config import PicturesConfig, ReportConfig, ScoreConfig
from taca_jax.evaluation.compbench.config import SweepConfig as CompbenchSweepConfig
from taca_jax.evaluation.shapes.config import EvalConfig, ShapesConfig
from taca_jax.evaluation.shapes.recogniser_error import RecogniserConfig
from taca_jax.evaluation.shapes.sweep_config import SweepConfig
from taca_jax.families.flux.model import FLUX_DEV
from taca_jax.nn.lora import LoRAConfig
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.sampling.loop import MAX_SEED
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.text.t5 import T5_XXL
from taca_jax.training.config import TrainConfig
from taca_jax.training.features import FeaturesConfig, Readout
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.step import TextToImage
from tests.training.tiny import tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]

ADAPT = TrainConfig(name="adapt", steps=100, base="base", lora=LoRAConfig(), taca=TacaConfig())
SCRATCH = TrainConfig("scratch", 100, model=FLUX_DEV, text=TextConfig(encoder=T5_XXL))
MUON = {"optimizer.kind": "muon"}
DRAW = GenerateConfig(base="base", prompt="a red circle")
MEASURE = ShapesConfig(base="base")
PICTURES = PicturesConfig(base="base")
SCORE = ScoreConfig("run", blip="blip")
REPORT = ReportConfig(("a", "b"))
COMPBENCH = (PicturesConfig, CompbenchSweepConfig, ScoreConfig, ReportConfig)
EVALUATIONS = (ShapesConfig, SweepConfig, AttentionConfig, RecogniserConfig)
KINDS = (TrainConfig, GenerateConfig, *EVALUATIONS, *COMPBENCH)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (ADAPT, {"name": "a/b"}, "name is a/b; it must be a plain folder name"),
        (ADAPT, {"name": ""}, "name is empty; it must be a plain folder name"),
        (ADAPT, {"steps": "0"}, "steps is 0; it must be 1 or more"),
        (ADAPT, {"out_dir": "s3://b/run"}, "out_dir is s3://b/run; it must be a folder, or one in"),
        (ADAPT, {"grad_accumulation": "0"}, "grad_accumulation is 0; it must be 1 or more"),
        (ADAPT, {"log_every": "-1"}, "log_every is -1; it must be 1 or more"),
        (ADAPT, {"timestep_shift": "0"}, "timestep_shift is 0.0; it must be a number above 0"),
        (ADAPT, {"save_every": "0"}, "save_every is 0; it must be 1 or more"),
        (ADAPT, {"keep_checkpoints": "0"}, "keep_checkpoints is 0; it must be 1 or more"),
        (ADAPT, {"sample_every": "-1"}, "sample_every is -1; it must be 0 (never) or more"),
        (ADAPT, {"sample_every": "5"}, "sample_every is 5 without sample_prompts; give some"),
        (ADAPT, {"seed": "-1"}, "seed is -1; it must be 0 to"),
        (ADAPT, {"seed": str(2**31)}, "seed is 2147483648; it must be 0 to"),
        (ADAPT, {"autoencoder": ""}, "autoencoder is empty; it must be pixels or a folder"),
        (ADAPT, {"dtype": "float16"}, "dtype=float16: expected one of float32, bfloat16"),
        (ADAPT, {"remat": "some"}, "remat=some: expected one of auto, none"),
        (ADAPT, {"base": "none"}, "base and model are both none; give base=FOLDER"),
        (SCRATCH, {"base": "there"}, "base=there says what the model is; leave model out"),
        (SCRATCH, {"lora.rank": "4"}, "lora adapts a trained model; give base=FOLDER"),
        (ADAPT, {"quantize": "int4"}, "quantize=int4: expected one of none, int8, nf4"),
        (SCRATCH, {"quantize": "int8"}, "quantize=int8 is for a base that stays as it is, and"),
        (SCRATCH, {"quantize_text": "nf4"}, "give a lora, or quantize_text=none"),
        (DRAW, {"quantize_text": "int4"}, "quantize_text=int4: expected one of none, int8, nf4"),
        (SCRATCH, {"text.encoder": "none"}, "without a base there is no text encoder"),
        (
            ADAPT,
            {"data.source": "folder:x", "evaluate.prompts": "1"},
            "evaluate reads shapes back, and data.source is folder:x; set evaluate=none",
        ),
        (ADAPT, {"optimizer.warmup_steps": "-1"}, "optimizer.warmup_steps is -1; it must be 0"),
        (ADAPT, {"optimizer.learning_rate": "0"}, "optimizer.learning_rate is 0.0; it must be"),
        (ADAPT, {"optimizer.learning_rate": "nan"}, "optimizer.learning_rate is nan; it must be"),
        (ADAPT, {"optimizer.weight_decay": "-1"}, "optimizer.weight_decay is -1.0; it must be"),
        (ADAPT, {"optimizer.b1": "1"}, "optimizer.b1 is 1.0; it must be at least 0 and below 1"),
        (ADAPT, {"optimizer.b2": "-1"}, "optimizer.b2 is -1.0; it must be at least 0 and below 1"),
        (ADAPT, {"optimizer.ema_decay": "1"}, "optimizer.ema_decay is 1.0; it must be at least 0"),
        (ADAPT, {"optimizer.clip_norm": "0"}, "optimizer.clip_norm is 0.0; it must be positive"),
        (ADAPT, {"optimizer.muon_beta": "0.9"}, "which optimizer.kind=adamw has no use for; leave"),
        (SCRATCH, MUON | {"optimizer.muon_beta": "1"}, "optimizer.muon_beta is 1.0; it must be"),
        (ADAPT, MUON, "and with lora none of them trains; set optimizer.kind=adamw, or lora=none"),
        (
            ADAPT,
            MUON | {"lora": "none", "gamma_knots": "4"},
            "with gamma_knots none of them trains; set optimizer.kind=adamw, or gamma_knots=none",
        ),
        (ADAPT, {"optimizer.kind": "adam"}, "optimizer.kind=adam: expected one of adamw, ada"),
        (
            ADAPT,
            {"optimizer.kind": "adafactor", "optimizer.b2": "0.99"},
            "are 0.9 and 0.99, which optimizer.kind=adafactor has no use for; leave them out",
        ),
        (ADAPT, {"optimizer.cycles": "0"}, "optimizer.cycles is 0; it must be 1 or more"),
        (ADAPT, {"optimizer.cycles": "3"}, "optimizer.cycles is 3, which optimizer.schedule=const"),
        (SCRATCH, {"pixels.scaling_factor": "0"}, "pixels.scaling_factor is 0.0; it must be posi"),
        (SCRATCH, {"pixels.shift_factor": "nan"}, "pixels.shift_factor is nan; it must be finite"),
        (ADAPT, {"data.source": "imagenet"}, "data.source is imagenet; it must be folder:PATH,"),
        (ADAPT, {"data.source": "folder:"}, "data.source is folder:; it must be folder:PATH,"),
        (ADAPT, {"data.batch_size": "0"}, "data.batch_size is 0; it must be 1 or more"),
        (ADAPT, {"data.resolution": "4"}, "data.resolution is 4; it must be 8 or more pixels"),
        (ADAPT, {"data.caption_dropout": "1.1"}, "data.caption_dropout is 1.1; it must be between"),
        (ADAPT, {"data.max_bad_share": "-0.1"}, "data.max_bad_share is -0.1; it must be between"),
        (ADAPT, {"data.seed": "-1"}, "data.seed is -1; it must be 0 or more"),
        (ADAPT, {"text.length": "0"}, "text.length is 0; it must be 1 or more tokens"),
        (ADAPT, {"text.tokenizer": ""}, "text.tokenizer is empty; it must be shapes, bytes or"),
        (ADAPT, {"evaluate.prompts": "0"}, "evaluate.prompts is 0; it must be 1 or more"),
        (ADAPT, {"evaluate.steps": "0"}, "evaluate.steps is 0; it must be 1 or more"),
        (ADAPT, {"evaluate.guidances": "1,-1"}, "evaluate.guidances is -1.0; it must be 0 or"),
        (ADAPT, {"evaluate.guidances": "2,2"}, "guidances is 2.0,2.0; it must be distinct numbers"),
        (ADAPT, {"evaluate.batch_size": "0"}, "evaluate.batch_size is 0; it must be 1 or more"),
        (ADAPT, {"taca.gamma": "-1"}, "taca.gamma"),
        (ADAPT, {"taca.threshold": "1000"}, "taca.threshold is 1000.0; it must be below 1000"),
        (ADAPT, {"taca.first_steps": "3"}, "taca.first_steps is 3, and training has no steps"),
        (ADAPT, {"lora.rank": "0"}, "rank"),
        (ADAPT, {"optimizer.decay_steps": "-1"}, "optimizer.decay_steps is -1; it must be 0 or"),
        (ADAPT, {"optimizer.decay_steps": "101"}, "decay_steps is 101; it must be at most steps"),
        (
            ADAPT,
            {"optimizer.decay_steps": "3", "optimizer.schedule": "cosine"},
            "optimizer.decay_steps is 3, which optimizer.schedule=cosine does not read",
        ),
        (
            ADAPT,
            {"features.weight": "0.2", "data.source": "generated:shapes"},
            "with lora a model's features stay as they are; set features=none",
        ),
        (
            ADAPT,
            {
                "features.weight": "0.2",
                "data.source": "generated:shapes",
                "lora": "none",
                "gamma_knots": "4",
            },
            "with gamma_knots a model's features stay as they are; set features=none",
        ),
        (SCRATCH, {"features.weight": "0"}, "features.weight is 0.0; it must be positive"),
        (SCRATCH, {"features.weight": "1"}, "labels of generated:shapes, and data.source is tfds"),
        (DRAW, {"steps": "0"}, "steps is 0; it must be 1 or more"),
        (DRAW, {"num_images": "0"}, "num_images is 0; it must be 1 or more"),
        (DRAW, {"batch_size": "0"}, "batch_size is 0; it must be 1 or more, or none"),
        (
            DRAW,
            {"seed": str(MAX_SEED), "num_images": "2"},
            f"seed + num_images - 1 is {MAX_SEED + 1}; it must be at most {MAX_SEED}",
        ),
        (DRAW, {"mesh.tensor": "0"}, "mesh.tensor is 0; it must be 1 or more"),
        (DRAW, {"height": "7"}, "height is 7; it must be 8 or more pixels"),
        (DRAW, {"width": "0"}, "width is 0; it must be 8 or more pixels"),
        (DRAW, {"guidance": "-2"}, "guidance is -2.0; it must be 0 or more, or none"),
        (DRAW, {"seed": "-2"}, "seed is -2; it must be 0 to"),
        (DRAW, {"out": "a.jpg"}, "out is a.jpg; it must be the name of a .png file"),
        (DRAW, {"compare": "true", "taca": "none"}, "compare=true compares plain with TACA"),
        (MEASURE, {"prompts": "0"}, "prompts is 0; it must be 1 or more per category"),
        (MEASURE, {"num_images": "0"}, "num_images is 0; it must be 1 or more"),
        (MEASURE, {"out": ""}, "out is empty; it must be the name of a folder"),
        (MEASURE, {"guidances": "nan"}, "guidances is nan; it must be 0 or more each"),
        (MEASURE, {"guidance": "2", "guidances": "1,3"}, "guidance is 2 and guidances are given"),
        (MEASURE, {"steps": "0"}, "steps is 0; it must be 1 or more"),
        (PICTURES, {"prompts": ""}, "prompts is empty; it must be the folder of the lists"),
        (PICTURES, {"out": ""}, "out is empty; it must be the folder to write to"),
        (PICTURES, {"categories": "colour"}, "categories=colour: expected a comma list, each one"),
        (PICTURES, {"categories": "color,color"}, "categories is color,color; it must be one or"),
        (PICTURES, {"categories": ""}, "categories is empty; it must be one or more, without"),
        (PICTURES, {"limit": "0"}, "limit is 0; it must be 1 or more, or none"),
        (PICTURES, {"num_images": "0"}, "num_images is 0; it must be 1 or more"),
        (PICTURES, {"batch_size": "0"}, "batch_size is 0; it must be 1 or more"),
        (PICTURES, {"seed": str(MAX_SEED)}, "the last picture's seed is 2147418120; it must be"),
        (SCORE, {"blip": "none"}, "blip and clip are both none; give the folder of at least one"),
        (SCORE, {"phrases": ""}, "phrases is empty; it must be spacy, rules or a JSON file"),
        (SCORE, {"batch_size": "0"}, "batch_size is 0; it must be 1 or more"),
        (REPORT, {"names": "a"}, "names is a; it must be one for each of the 2 runs"),
        (REPORT, {"runs": "a,a"}, "runs is a,a; it must be distinct folders"),
        (REPORT, {"out": "a.txt"}, "out is a.txt; it must be the name of a .json file, or none"),
    ],
)
def test_what_cannot_run_is_refused_by_name(config, values, message):
    with pytest.raises(UserError) as error:
        update(config, values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [ADAPT, SCRATCH, DRAW], ids=["adapt", "scratch", "draw"])
def test_a_recorded_configuration_comes_back_and_can_be_compared(config):
    again = from_json(type(config), to_json(config))
    assert again == config
    assert difference(config, again) == {}
    assert difference(config, update(again, {"seed": "7"})) == {"seed": (0, 7)}


def test_the_run_folder_follows_the_name_unless_given():
    assert ADAPT.run_dir == Path("runs/adapt")
    assert update(ADAPT, {"out_dir": "elsewhere/x"}).run_dir == Path("elsewhere/x")


def test_the_learning_rate_warms_up_and_falls():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="cosine")
    rates = np.array([config.learning_rate_at(step, 20) for step in range(21)])
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    assert np.all(np.diff(rates[4:]) < 0)
    np.testing.assert_allclose(rates[12], 1.0, rtol=1e-6)  # half-way between warm-up and the end
    np.testing.assert_allclose(rates[20], 0.0, atol=1e-6)
    constant = dataclasses.replace(config, schedule="constant")
    assert constant.learning_rate_at(19, 20) == 2.0


def test_a_constant_learning_rate_may_decline_at_the_end_of_a_run():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, decay_steps=4)
    rates = config.learning_rate_at(jnp.array([3, 15, 16, 17, 18, 19]), 20)
    np.testing.assert_allclose(rates, [2.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    # A longer run is the same up to there.
    assert config.learning_rate_at(15, 20) == config.learning_rate_at(15, 1000)


def _first_update(config: OptimizerConfig, params, grads):
    optimizer = config.make(total_steps=10)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    return updates


def test_weight_decay_acts_on_matrices_only():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    params = {"q": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}, "lora_a": jnp.ones(2)}
    updates = _first_update(config, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(updates["q"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["lora_a"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["q"]["bias"], 0.0)


def test_weight_decay_finds_the_matrices_of_an_nnx_state():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    params = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(jnp.ones_like, params)
    updates = _by_name(_first_update(config, params, jax.tree.map(jnp.zeros_like, params)))
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


def test_the_optimizer_is_adam_on_clipped_gradients():
    config = OptimizerConfig(learning_rate=0.1, b1=0.5, b2=0.5, clip_norm=1.0)
    params, grads = {"kernel": jnp.zeros(4)}, {"kernel": jnp.full(4, 1e-8)}
    # Adam divides by |gradient| + 1e-8: here 1/2 as it is, and nearly 1 where it is long.
    np.testing.assert_allclose(_first_update(config, params, grads)["kernel"], -0.05, rtol=1e-4)
    grads = {"kernel": jnp.full(4, 1e30)}
    assert np.isfinite(_first_update(config, params, grads)["kernel"]).all()
    free = dataclasses.replace(config, clip_norm=None)
    squared_overflows = _first_update(free, params, grads)["kernel"]
    np.testing.assert_array_equal(squared_overflows, 0.0)


HIDDEN = re.compile(
    r"transformer\.(txt_in|(time|vector)_in\.linear_[12]"
    r"|double_blocks\.(img|txt)\.(qkv\.[qkv]|out|mlp_in|mlp_out)"
    r"|single_blocks\.(qkv\.[qkv]|mlp_in|out))\.kernel"
    r"|text_encoder\.t5\.blocks\.(attn\.[qkvo]|ff\.(wi_gate|wi_value|wo))\.kernel"
)
"""What Muon updates of a FLUX and its T5."""


def test_muon_turns_hidden_kernels_and_leaves_the_rest_to_adam():
    rate, decay = 0.01, 0.5
    muon = OptimizerConfig("muon", learning_rate=rate, weight_decay=decay, clip_norm=None)
    pipeline = tiny_pipeline()
    readout = Readout(pipeline.transformer.config.hidden, rngs=nnx.Rngs(0))
    model = TextToImage(pipeline.transformer, pipeline.text_encoder, readout)
    params = nnx.state(model, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    grads = jax.tree.unflatten(structure, grads)
    adam = optax.adamw(rate, weight_decay=0.0, nesterov=True)
    by_adam, _ = jax.jit(adam.update)(grads, adam.init(params), params)
    by_adam, before, updates = map(_by_name, (by_adam, params, _first_update(muon, params, grads)))

    same = {name for name in updates if np.allclose(updates[name], by_adam[name], rtol=1e-4)}
    assert updates.keys() - same == {name for name in updates if HIDDEN.fullmatch(name)}
    assert len(updates.keys() - same) == 1 + 4 + 2 * 6 + 5 + 7
    for name in updates.keys() - same:
        step = (updates[name] + rate * decay * before[name]) / -rate  # [layers, in, out], or one
        assert 0.7 < np.sqrt(np.mean(step**2)) < 1.2, name
        singular = np.linalg.svd(step, compute_uv=False) / np.sqrt(max(step.shape[-2:]))
        assert singular.max() < 1.3, name
        if step.shape[-2] != step.shape[-1]:  # square noise has directions of hardly any length
            assert singular.min() > 0.6, name


def _by_name(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): np.array(
            leaf
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_documented(kind):
    own = (TrainConfig, GenerateConfig, TextConfig, DataConfig, OptimizerConfig, EvalConfig)
    own += (PixelsConfig, FeaturesConfig, *EVALUATIONS, *COMPBENCH)
    fields = fields_of(kind)
    for name, field in fields.items():
        parent = fields[name.rpartition(".")[0]].group if "." in name else kind
        assert field.doc or parent not in own, f"{name} has no line in its class's docstring"


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_read(kind):
    """A field that nothing reads is a setting that does nothing.

    A read is `RECEIVER.field`, outside validation, where RECEIVER is what configurations are
    called: `config`, something that ends in `config`, the name of the group (`data`), or `self`
    within the class itself.
    """
    reads = _attribute_reads()
    unread = []
    for name, field in fields_of(kind).items():
        group, _, last = name.rpartition(".")
        owner = fields_of(kind)[group].group if group else kind
        assert owner is not None
        receivers = {"config", group.rpartition(".")[2] or "config", owner.__name__}
        if field.group is None and not receivers & reads.get(last, set()):
            unread.append(name)
    assert not unread, f"read by nothing: {', '.join(unread)}"


def _attribute_reads() -> dict[str, set[str]]:
    """attribute -> the receivers it is read from; `self` counts as the name of its class."""
    reads: dict[str, set[str]] = {}

    def visit(node: ast.AST, owner: str) -> None:
        if isinstance(node, ast.ClassDef):
            owner = node.name
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            receiver = _last_name(node.value)
            receiver = owner if receiver == "self" else receiver
            receiver = "config" if receiver.endswith("config") else receiver
            reads.setdefault(node.attr, set()).add(receiver)
        for child in ast.iter_child_nodes(node):
            visit(child, owner)

    programs = [ROOT / name for name in ("train.py", "generate.py") if (ROOT / name).exists()]
    for path in [*sorted((ROOT / "taca_jax").rglob("*.py")), *programs]:
        visit(ast.parse(path.read_text()), "")
    return reads


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def test_annotations_are_types_that_the_command_line_can_read():
    plain = {int, float, bool, str, type(None), Ellipsis}

    def leaves(annotation):
        inner = typing.get_args(annotation)
        if not inner or typing.get_origin(annotation) is typing.Literal:
            return {annotation}
        return set().union(*map(leaves, inner))

    for kind in KINDS:
        for name, field in fields_of(kind).items():
            for leaf in leaves(field.annotation) if field.group is None else ():
                literal = typing.get_origin(leaf) is typing.Literal
                assert literal or leaf in plain, f"{name}: {field.annotation}"
    for kind in KINDS:
        for name, field in fields_of(kind).items():
            if field.group is None and typing.get_origin(field.annotation) is not typing.Literal:
                inner = typing.get_args(field.annotation) or (field.annotation,)
                plain_ones = [
                    item for item in inner if typing.get_origin(item) is not typing.Literal
                ]
                flat = {leaf for item in plain_ones for leaf in typing.get_args(item) or (item,)}
                assert flat <= plain, f"{name}: {field.annotation}"


def test_the_linear_schedule_falls_to_zero_behind_the_last_step():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="linear")
    rates = config.learning_rate_at(jnp.arange(12), 12)
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(rates[4:], 2 * (1 - np.arange(8) / 8), rtol=1e-6)


def test_restarts_are_several_declines_of_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=2, schedule="restarts", cycles=3)
    rates = config.learning_rate_at(jnp.arange(14), 14)
    one = dataclasses.replace(config, schedule="cosine", cycles=1).learning_rate_at
    np.testing.assert_allclose(rates[:2], [1.0, 2.0])
    np.testing.assert_allclose(rates[2:], [*one(jnp.arange(2, 6), 6)] * 3, rtol=1e-5)
    assert float(rates.min()) > 0


def test_adafactor_decays_matrices_at_the_learning_rate():
    """And its first step is of the learning rate's size, whatever the gradient's."""
    params = {"kernel": jnp.full((160, 130), 3.0), "bias": jnp.full(7, 3.0)}
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    config = OptimizerConfig("adafactor", learning_rate=1e-2, weight_decay=0.5, clip_norm=None)
    update = config.make(10)
    state = update.init(params)
    found, state = update.update(grads, state, params)
    np.testing.assert_allclose(found["bias"], -1e-2, rtol=1e-3)
    np.testing.assert_allclose(found["kernel"], -1e-2 * (1 + 0.5 * 3), rtol=1e-3)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.size > 7)
    assert sizes == [130, 160]  # of the kernel no second moment is whole


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_is_cut_to_the_length_of_the_run(schedule):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=100, schedule=schedule)
    np.testing.assert_allclose(config.learning_rate_at(jnp.arange(4), 4), [0.5, 1.0, 1.5, 2.0])
