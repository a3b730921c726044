"""A training run from start (or checkpoint) to exported weights and their measurement."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from taca_jax.config.fields import difference, from_json, to_json
from taca_jax.data.loader import Loader
from taca_jax.errors import StoppedError, UserError
from taca_jax.evaluation.alignment import evaluate_shapes
from taca_jax.formats.atomic import whole_file
from taca_jax.nn.layers import LoRAParam
from taca_jax.parallel.batches import put_rows
from taca_jax.parallel.mesh import on
from taca_jax.parallel.processes import (
    do_not_wait_at_exit,
    is_first,
    join_processes,
    on_host,
    wait_for_all,
)
from taca_jax.pipelines.grids import caption_grid
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.planning.plan import plan
from taca_jax.planning.slices import chip_of
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.training.build import autoencoder_config, build_pipeline, check_batch
from taca_jax.training.checkpoints import Checkpoints
from taca_jax.training.config import TrainConfig
from taca_jax.training.encoding import ready_cache
from taca_jax.training.flops import step_flops, text_tokens
from taca_jax.training.health import Health, Step
from taca_jax.training.inputs import open_loader
from taca_jax.training.log import RunLog
from taca_jax.training.mesh_choice import choose_mesh
from taca_jax.training.signals import Notice
from taca_jax.training.step import (
    Batch,
    EncodedBatch,
    TextToImage,
    Trainer,
    TrainState,
    make_trainer,
)
from taca_jax.weights.lora_files import write_lora
from taca_jax.weights.pipeline_folders import ROLES

# What may differ between a run and its resumption without making it another run.
FREE_FIELDS = (
    "resume",
    "out_dir",
    "plan",
    "mesh",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "sample_every",
    "sample_prompts",
    "evaluate",
    "data.cache",
    "data.max_bad_share",
)

RECORD = "config.json"
"""What a run's folder says of the run."""


def train(config: TrainConfig) -> None:
    """Trains as configured and leaves everything in `config.run_dir`.

    That folder then holds config.json, metrics.jsonl, tensorboard/, checkpoints/, samples/, and
    `lora.safetensors` (with config.lora) or `model/` (a pipeline folder), and `evaluation.json` and
    `.png` where asked for. Of several processes all run it, and the first writes. With config.plan
    nothing is trained (see `training.plan`). Raises UserError for what the user can mend, and
    StoppedError when told to stop (SIGTERM), once everything is saved.
    """
    if config.plan is not None:
        return plan(config)
    join_processes()
    try:
        mesh = choose_mesh(config, jax.devices()) if jax.device_count() > 1 else None
        with on(mesh):
            _run(config, mesh, Notice(f"go on with resume=true out_dir={config.run_dir}"))
    except StoppedError:
        raise
    except BaseException:
        do_not_wait_at_exit()
        raise
    return None


def _run(config: TrainConfig, mesh: Mesh | None, notice: Notice) -> None:
    run_dir = config.run_dir
    _check_free(config, run_dir)
    check_batch(config, mesh)
    cached = config.data.encode == "cache"
    cache = ready_cache(config, mesh, notice) if cached else None
    pipeline = build_pipeline(config, mesh, only=("transformer",) if cached else ROLES)
    _check_prompts(config, pipeline)
    try:
        with open_loader(config, pipeline, mesh, cache) as loader:
            # Only now: what fails before this leaves no run behind.
            wait_for_all("a run that can begin")
            if is_first():
                with whole_file(run_dir / RECORD) as record:
                    record.write_text(to_json(config))
            _train(config, pipeline, loader, mesh, notice)
            for line in loader.skipped():
                print(line, file=sys.stderr)
        _export(config, pipeline, run_dir)
        if config.evaluate is not None:
            if cached:
                _complete(config, pipeline, mesh)
            evaluate_shapes(
                pipeline, config.evaluate, run_dir, taca=config.taca, lora=config.lora is not None
            )
    except OSError as error:
        raise UserError(
            f"{error.filename or run_dir}: {error.strerror or error}; mend that and go on with "
            "resume=true"
        ) from error


def _complete(config: TrainConfig, pipeline: Pipeline, mesh: Mesh | None) -> None:
    """Reads the parts that training from a cache does without."""
    others = build_pipeline(config, mesh, only=("text", "autoencoder"))
    pipeline.text_encoder, pipeline.tokenizer = others.text_encoder, others.tokenizer
    pipeline.autoencoder = others.autoencoder


def _check_free(config: TrainConfig, run_dir: Path) -> None:
    """Raises UserError unless the folder is new, or holds this run and is to be gone on with."""
    record = run_dir / RECORD
    if not record.is_file():
        # Allowed, so that one command serves the first start and every restart.
        if config.resume and is_first():
            print(f"{run_dir} holds no run yet: starting one", file=sys.stderr)
        return
    if not config.resume:
        raise UserError(
            f"{run_dir} holds a run already; resume=true goes on with it, out_dir=... starts "
            "another"
        )
    changed = [
        name
        for name in difference(from_json(TrainConfig, record.read_text(), str(record)), config)
        if name not in FREE_FIELDS and name.split(".")[0] not in FREE_FIELDS
    ]
    if changed:
        raise UserError(
            f"{run_dir} was started with other values of {', '.join(changed)}; resume with the "
            "same, or start another run with out_dir=..."
        )


def _check_prompts(config: TrainConfig, pipeline: Pipeline) -> None:
    """Finds prompts that cannot be drawn before the first of many steps, not at the first grid."""
    if config.sample_every:
        _tokenizer(pipeline)(config.sample_prompts)


def _train(
    config: TrainConfig, pipeline: Pipeline, loader: Loader, mesh: Mesh | None, notice: Notice
) -> None:
    """Runs all steps that are left, and puts what they made into `pipeline`."""
    model = TextToImage(pipeline.transformer, pipeline.text_encoder)
    if config.data.encode == "cache":
        autoencoder, pad_id = autoencoder_config(config), 0  # nothing is padded any more
    else:
        assert pipeline.autoencoder is not None  # build_pipeline saw to it
        autoencoder, pad_id = pipeline.autoencoder, _tokenizer(pipeline).pad_id
    trainer, trained = make_trainer(config, model, autoencoder, pad_id=pad_id, mesh=mesh)
    state = trainer.begin(trained)
    with Checkpoints(
        config.run_dir, keep=config.keep_checkpoints, frozen=trainer.frozen
    ) as checkpoints:
        if config.resume:
            restored = checkpoints.restore(
                state,
                warn=lambda line: (
                    print(f"warning: {line}", file=sys.stderr) if is_first() else None
                ),
            )
            if restored is not None:
                state, position = restored
                loader.set_state(position)
                if is_first():
                    print(f"going on after step {int(state.step)}")
        state = _loop(config, pipeline, trainer, state, loader, checkpoints, mesh, notice)
    _install(pipeline, trainer.merge(state.best))


def _tokenizer(pipeline: Pipeline) -> Tokenizer:
    assert pipeline.tokenizer is not None  # build_pipeline saw to it
    return pipeline.tokenizer


def _loop(
    config: TrainConfig,
    pipeline: Pipeline,
    trainer: Trainer,
    state: TrainState,
    loader: Loader,
    checkpoints: Checkpoints,
    mesh: Mesh | None,
    notice: Notice,
) -> TrainState:
    start = int(state.step)
    before: Step | None = None
    log = _log(config, pipeline, start) if is_first() else None
    health = Health()

    def report(step: Step) -> None:
        health.check(step, state)
        due = step.number % config.log_every == 0 or step.number in (start + 1, config.steps)
        if log is not None and due:
            log.write(step.number, {name: float(value) for name, value in step.metrics.items()})

    with notice.steps(), nullcontext() if log is None else log:
        for number in range(start + 1, config.steps + 1):
            batch, names = _next_batch(loader, config.grad_accumulation, mesh)
            state, metrics = trainer.run(state, batch)
            # Read the step before while this one runs, so that the device never waits for us.
            if before is not None:
                report(before)
            before = Step(number, metrics, names)
            told = notice.reached()
            if number % config.save_every == 0 or number == config.steps or told:
                # A checkpoint of NaNs would push the good ones out.
                health.check(before)
                checkpoints.save(state, loader.get_state())
            if told:
                report(before)
                checkpoints.wait()
                raise notice.stopped(f"saved after step {number} of {config.steps}")
            if config.sample_every and number % config.sample_every == 0:
                _install(pipeline, trainer.merge(state.best))
                _sample(config, pipeline, log, number)
        if before is not None:
            report(before)
        checkpoints.wait()
    return state


def _log(config: TrainConfig, pipeline: Pipeline, start: int) -> RunLog:
    flops = _step_flops(config, pipeline)
    chip = chip_of(jax.devices()[0].device_kind)
    return RunLog(
        config.run_dir,
        start=start,
        steps=config.steps,
        samples_per_step=config.data.batch_size * config.grad_accumulation,
        flops_per_step=flops,
        peak_flops=None if chip is None else chip.flops * jax.device_count(),
    )


def _step_flops(config: TrainConfig, pipeline: Pipeline) -> float:
    if config.data.encode == "cache":
        downscale = autoencoder_config(config).downscale
    else:
        assert pipeline.autoencoder is not None  # build_pipeline saw to it
        downscale = pipeline.autoencoder.config.downscale
    transformer = pipeline.transformer.config
    side = config.data.resolution // downscale // transformer.patch_size
    text = text_tokens(transformer, pipeline.settings.text_length)
    return step_flops(config, transformer, image=side * side, text=text)


def _next_batch(
    loader: Loader, parts: int, mesh: Mesh | None
) -> tuple[Batch | EncodedBatch, list[str]]:
    """Batches for every part of a step, and the names of this process's samples in them.

    Each process brings the samples that its devices hold.
    """
    batches = [next(loader) for _ in range(parts)]

    def placed(arrays: list[np.ndarray]) -> jax.Array:
        local = arrays[0][None] if parts == 1 else np.stack(arrays)
        return put_rows(local, mesh, leading=1)

    names = [name for name in batches[0] if name != "id"]
    arrays = {name: placed([batch[name] for batch in batches]) for name in names}
    batch = Batch(**arrays) if "image" in arrays else EncodedBatch(**arrays)
    return batch, [name for batch in batches for name in batch["id"]]


def _install(pipeline: Pipeline, model: TextToImage) -> None:
    pipeline.transformer, pipeline.text_encoder = model.transformer, model.text_encoder


def _sample(config: TrainConfig, pipeline: Pipeline, log: RunLog | None, step: int) -> None:
    prompts = list(config.sample_prompts)
    pictures = pipeline(prompts, taca=config.taca, seed=config.seed, progress=False).images
    if log is None:  # the processes draw together, and the first keeps the pictures
        return
    assert isinstance(pictures, list)
    grid = caption_grid(pictures, prompts)
    folder = config.run_dir / "samples"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"{step:07d}.png")
    log.image(step, "samples", np.asarray(grid))


def _export(config: TrainConfig, pipeline: Pipeline, run_dir: Path) -> None:
    lora = config.lora is not None
    if jax.process_count() > 1:
        pipeline = _gathered(pipeline, LoRAParam if lora else nnx.Variable)
    if not is_first():
        return
    if lora:
        write_lora(run_dir / "lora.safetensors", pipeline.transformer)
        print(f"LoRA written to {run_dir / 'lora.safetensors'}")
    else:
        pipeline.save(run_dir / "model", dtype="bfloat16")
        print(f"model written to {run_dir / 'model'}")


def _gathered(pipeline: Pipeline, kind: type[nnx.Variable]) -> Pipeline:
    """A copy of the pipeline whose parameters of a kind are on the host, in every process."""
    found = copy.copy(pipeline)
    for name in ("transformer", "text_encoder", "autoencoder"):
        part = getattr(pipeline, name)
        if part is not None:
            graph, ours, others = nnx.split(part, kind, ...)
            setattr(found, name, nnx.merge(graph, jax.tree.map(on_host, ours), others))
    return found
