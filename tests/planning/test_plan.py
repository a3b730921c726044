"""What a run would take on a slice of TPUs: names of slices, what is refused, and a small plan.

The plan itself is made in a process of its own, which libtpu, once loaded, would stay in.
"""

import importlib.util
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs.sd35_taca import CONFIG
from taca_jax.autoencoders.pixels import Pixels
from taca_jax.config.json_text import to_json
from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.families.sd3.pipeline import SD3Pipeline
from taca_jax.families.sd3.text import SD3Text
from taca_jax.nn.layers import Fixed, LoRAParam
from taca_jax.nn.lora import LoRAConfig
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.planning import plan as plan_module
from taca_jax.planning.plan import _batch, in_units
from taca_jax.planning.slices import Slice, slice_names
from taca_jax.planning.traffic import Traffic
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.training.models import open_models
from taca_jax.training.step import Batch, EncodedBatch
from tests.processes import NOT_KEPT, OPTIMISED, last_line, run_python
from tests.random_models import random_model
from tests.training.test_sd3 import CLIP
from tests.training.test_sd3 import TINY as SD3
from tests.training.tiny import tiny_config, tiny_pipeline


def test_slices_are_named_as_they_are_rented():
    assert Slice.of("v5e-16").topology == "v5e:4x4"
    v5p = Slice.of("v5p-8")  # cores, two a chip
    assert (v5p.chips, v5p.topology) == (4, "v5p:2x2x1")
    assert [other.name for other in Slice.of("v6e-64").larger()] == ["v6e-128", "v6e-256"]
    for name in slice_names():
        assert Slice.of(name).name == name
    for name in ("v5e-3", "v5p-7", "v9-8", "16"):
        with pytest.raises(UserError, match=f"plan={name}: no such slice; there are v5e-1, v5e-4"):
            Slice.of(name)


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (6_618_000_000, "B", "6.62 GB"),
        (123_400, "B", "123 kB"),
        (12, "B", "12 B"),
        (0, "B", "0 B"),
        (1.59e14, "FLOP", "159 TFLOP"),
        (0.76, "s", "760 ms"),
        (4.2e-6, "s", "4.2 µs"),
        (4000.0, "s", "4,000 s"),
    ],
)
def test_units_fit_what_is_said(value, unit, said):
    assert in_units(value, unit) == said


@pytest.fixture
def base(tmp_path):
    tiny_pipeline().save(tmp_path / "base")
    return tmp_path / "base"


def config_on(base, **changes):
    adapt = {
        "base": str(base),
        "model": None,
        "text": TextConfig(),
        "lora": LoRAConfig(rank=2),
        "taca": TacaConfig(threshold=500),
    }
    return tiny_config(base.parent / "run", **(adapt | changes))


def open_or_published(config):
    return open_models(config, published=True)


def test_text_is_as_long_as_the_base_says(base):
    models = open_or_published(config_on(base))
    assert set(models.stored.models) == {"transformer", "text_encoder", "autoencoder"}
    assert (models.reading.tokens, models.token_ids) == (16, 16)
    published = open_or_published(
        config_on(Path("flux1-schnell"), data=DataConfig("folder:x", 2, 1024))
    )
    assert published.reading.tokens == 256
    assert not published.transformer.guidance_embed


def test_a_base_that_is_neither_there_nor_published_is_refused(base):
    known = "flux1-dev, flux1-krea-dev, flux1-schnell, sd35-medium, sd35-large, sd3-medium"
    with pytest.raises(UserError, match=rf"is not there; plan for {known}, .*flux2-dev needs no"):
        open_or_published(config_on(base.parent / "nothing"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("transformer", "transformer is no model folder"),
        ("text_encoder", r"lacks text encoders \(FLUX.1 has CLIP and T5\), which training needs"),
        ("autoencoder", r"lacks an autoencoder \(autoencoder=FOLDER\), which training needs"),
    ],
)
def test_a_base_without_a_part_is_refused(base, part, message):
    shutil.rmtree(base / part)
    with pytest.raises(UserError, match=message):
        open_or_published(config_on(base))


def test_what_the_compiler_refuses_is_said_with_what_fits(base, monkeypatch):
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (22.55G) exceeds available HBM (15.75G). HLO module: j."
    )

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(said)

    def make_plan(models, where):
        if where.chips == 1:
            plan_module._compiled(Lowered())
        return SimpleNamespace(fits=where.chips > 4)

    monkeypatch.setattr(plan_module, "make_plan", make_plan)
    message = (
        r"^the compiler says: Ran out of memory on HBM, .* \(22.55G\) exceeds available HBM "
        r"\(15.75G\); plan=v5e-8 data.batch_size=16 fits \(or with less: "
        r"quantize=nf4, quantize_text=int8, data.encode=cache, remat=full\)$"
    )
    with pytest.raises(UserError, match=message):
        plan_module.plan(config_on(base, plan="v5e-1"))


def test_whole_parameters_that_do_not_fit_are_to_be_shared(base, monkeypatch):
    def make_plan(models, where):
        if models.config.mesh.open:
            raise plan_module.OutOfMemoryError("too large")
        return SimpleNamespace(fits=models.config.mesh.fsdp == -1)

    monkeypatch.setattr(plan_module, "make_plan", make_plan)
    data = replace(config_on(base).data, batch_size=8)
    with pytest.raises(UserError, match=r"too large; mesh\.fsdp=-1, which shares parameters, fits"):
        plan_module.plan(config_on(base, plan="v5e-8", data=data))


@pytest.mark.parametrize("fits", [True, False])
def test_encoding_before_the_first_step_is_planned_for_too(base, monkeypatch, capsys, fits):
    def plan_of(where, memory):
        return plan_module.Plan(
            where=where,
            mesh=SimpleNamespace(shape={}),
            batch=1,
            resolution=40,
            parts={"encoder": memory},
            program=0,
            flops=1.0,
            further=0.0,
            remat=None,
            traffic=Traffic(seconds=1.0),
            compile_seconds=1.0,
            text="",
        )

    needs = 12 * 10**9 if fits else 20 * 10**9
    monkeypatch.setattr(plan_module, "make_plan", lambda _, where: plan_of(where, 1))
    monkeypatch.setattr(
        plan_module, "encoding_plans", lambda _, where: {"encoding pictures": plan_of(where, needs)}
    )
    cached = DataConfig(
        source=("generated:shapes/64",), batch_size=1, resolution=40, encode="cache"
    )
    config = config_on(base, plan="v5e-1", data=cached)
    if fits:
        plan_module.plan(config)
        assert re.search(r"encoding pictures, before +│ +12 GB, 70%", capsys.readouterr().out)
    else:
        with pytest.raises(UserError, match=r"encoding pictures takes 20.0 GB, .* chip's 17.2 GB"):
            plan_module.plan(config)


def test_stable_diffusion_is_planned_for():
    """Its published shapes: as many parameters as the original, and as many tokens."""
    config = replace(CONFIG, data=replace(CONFIG.data, batch_size=1))
    models = open_or_published(config).on_mesh(make_mesh(MeshConfig(), jax.devices()[:1]))
    model, autoencoder = models.abstract()
    batch, text = _batch(models, autoencoder), models.reading.tokens
    cached = replace(config, data=replace(config.data, encode="cache"))
    encoded = _batch(replace(models, config=cached), autoencoder)
    kernels = nnx.state(model.transformer, nnx.Any(nnx.Param, Fixed))
    sizes = [
        (isinstance(param, LoRAParam), math.prod(param.shape))
        for _, param in nnx.to_flat_state(kernels)
    ]
    assert sum(size for is_lora, size in sizes if not is_lora) == 2_469_663_936
    assert any(is_lora for is_lora, _ in sizes)
    assert (model.transformer.remat, model.transformer.attention) == ("full", "auto")
    assert isinstance(model.text_encoder, SD3Text)
    assert model.text_encoder.t5 is not None
    assert isinstance(batch, Batch)
    assert (text, batch.tokens.shape) == (77 + 256, (1, 1, 77 + 77 + 256))
    assert isinstance(encoded, EncodedBatch)
    assert encoded.mean.shape == (1, 1, 128, 128, 16)
    assert (encoded.txt.shape, encoded.txt.dtype) == ((1, 1, text, 4096), jnp.bfloat16)
    assert encoded.pooled.shape == (1, 1, 2048)


SCRIPT = """
import json, sys
from taca_jax.config.json_text import from_json
from taca_jax.planning.plan import encoding_plans, make_plan
from taca_jax.planning.slices import Slice
from taca_jax.training.config import TrainConfig
from taca_jax.training.models import open_models
models = open_models(from_json(TrainConfig, open(sys.argv[1]).read()))
plan = make_plan(models, Slice.of("v5e-4"))
cached = models.config.data.encode == "cache"
before = encoding_plans(models, Slice.of("v5e-4")) if cached else {}
print(json.dumps({"before": {name: [each.parts, each.program] for name, each in before.items()},
                  "parts": plan.parts, "program": plan.program, "flops": plan.flops,
                  "further": plan.further, "remat": plan.remat,
                  "estimated": plan.estimated, "utilisation": plan.utilisation,
                  "received": plan.traffic.together.received,
                  "seconds": plan.seconds, "hidden": plan.hidden, "fits": plan.fits,
                  "mesh": dict(plan.mesh.shape)}))
"""


@pytest.fixture
def sd3_base(tmp_path):
    path = tmp_path / "base"
    clip = replace(CLIP, max_tokens=8)
    SD3Pipeline(
        random_model(replace(SD3, position_size=20)),
        text_encoder=SD3Text(
            random_model(clip), random_model(clip), None, width=SD3.txt_dim, t5_length=16
        ),
        tokenizer=None,
        autoencoder=Pixels(),
        settings=tiny_pipeline().settings,
    ).save(path)
    return path


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("folder", "changes", "encode"),
    [
        ("base", {"quantize": "nf4", "quantize_text": "int8"}, "online"),
        ("base", {"remat": "full", "dtype": "bfloat16"}, "cache"),
        ("sd3_base", {"remat": "auto", "lora": CONFIG.lora}, "online"),
    ],
)
def test_a_small_plan(folder, changes, encode, request, tmp_path):
    source = ("generated:shapes/64",)
    data = DataConfig(source=source, batch_size=4, resolution=40, encode=encode)
    config = config_on(request.getfixturevalue(folder), data=data, **changes)
    (tmp_path / "config.json").write_text(to_json(config))
    arguments = "-c", SCRIPT, str(tmp_path / "config.json")
    plan = json.loads(last_line(run_python(*arguments, environment=OPTIMISED | NOT_KEPT)))
    assert plan["fits"]
    assert plan["mesh"] == {"data": 4, "fsdp": 1, "context": 1, "tensor": 1}  # it has room
    assert plan["parts"]["trained parameters, optimizer"] > 0
    assert plan["parts"]["transformer, frozen"] > 0
    assert min(plan["program"], plan["flops"], plan["received"], *plan["seconds"].values()) > 0
    assert 0 < plan["further"] < plan["flops"]
    # A small model's activations fit, so that `auto` keeps all products.
    taken = {"auto": "attention+qkv+mlp"}
    asked = changes.get("remat", "none")
    assert plan["remat"] == taken.get(asked, asked)
    # The compiler counts what the roofline leaves out.
    assert plan["estimated"] > max(plan["seconds"]["matrix units"], plan["seconds"]["wires"])
    assert 0 < plan["utilisation"] < 1
    assert 0 <= plan["hidden"] <= 1
    assert list(plan["before"]) == (
        ["encoding pictures", "encoding captions"] if encode == "cache" else []
    )
    for parts, program in plan["before"].values():
        assert parts["text encoders"] > 0  # which are in memory in both
        assert parts["autoencoder"] == 0  # of pixels
        assert program > 0
