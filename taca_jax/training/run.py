"""A training run from start (or checkpoint) to exported weights and their measurement."""

import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from taca_jax.config.fields import difference, from_json, to_json
from taca_jax.data.cache import Cache
from taca_jax.data.loader import Loader
from taca_jax.errors import StoppedError, UserError
from taca_jax.evaluation.alignment import evaluate_shapes
from taca_jax.formats.atomic import whole_file
from taca_jax.nn.layers import LoRAParam
from taca_jax.parallel.batches import put_rows
from taca_jax.parallel.chips import chip_of
from taca_jax.parallel.choice import choose_mesh
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
from taca_jax.training.cache_stage import ready_cache
from taca_jax.training.checkpoints import Checkpoints
from taca_jax.training.config import TrainConfig
from taca_jax.training.health import Health, Step
from taca_jax.training.inputs import open_loader
from taca_jax.training.log import RunLog
from taca_jax.training.models import (
    InputModels,
    RunModels,
    TextToImage,
    check_mesh,
    open_models,
)
from taca_jax.training.signals import Notice
from taca_jax.training.step import Batch, EncodedBatch, Trainer, TrainState, make_trainer
from taca_jax.weights.lora_files import write_lora

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
    `.png` where asked for. Of several processes all run it, and the first writes. Raises UserError
    for what the user can mend, and StoppedError when told to stop (SIGTERM), once everything is
    saved.
    """
    join_processes()
    try:
        _check_free(config, config.run_dir)
        models = open_models(config)
        mesh = choose_mesh(config.mesh, jax.devices(), models.parameter_bytes)
        if mesh.size == 1:
            mesh = None
        check_mesh(config, models, mesh)
        with on(mesh):
            _run(config, models, mesh, Notice(f"go on with resume=true out_dir={config.run_dir}"))
    except StoppedError:
        raise
    except BaseException:
        do_not_wait_at_exit()
        raise


def _run(config: TrainConfig, models: RunModels, mesh: Mesh | None, notice: Notice) -> None:
    if config.data.encode == "cache":
        inputs = ready_cache(config, models, mesh, notice)
    else:
        inputs = models.load_inputs(mesh)
    transformer = models.load_transformer(mesh)
    if config.taca is not None and is_first():
        print(
            f"training under TACA: gamma {config.taca.gamma:g} ({config.taca.schedule}) at times "
            f"above {config.taca.threshold:g}, from which all are drawn"
        )
    sampler = None
    if config.sample_every and isinstance(inputs, InputModels):
        sampler = models.pipeline(transformer, inputs, mesh)
        # Prompts that cannot be read are found now, and not at the first grid.
        inputs.tokenizer(config.sample_prompts)
    try:
        with open_loader(config, models, inputs, mesh) as loader:
            # Only now: what fails before this leaves no run behind.
            wait_for_all("a run that can begin")
            if is_first():
                with whole_file(config.run_dir / RECORD) as record:
                    record.write_text(to_json(config))
            trained = _train(config, models, transformer, inputs, sampler, loader, mesh, notice)
            for line in loader.skipped():
                print(line, file=sys.stderr)
        _finish(config, models, trained, inputs, mesh)
    except OSError as error:
        raise UserError(
            f"{error.filename or config.run_dir}: {error.strerror or error}; mend that and go on "
            "with resume=true"
        ) from error


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


def _train(
    config: TrainConfig,
    models: RunModels,
    transformer: nnx.Module,
    inputs: InputModels | Cache,
    sampler: Pipeline | None,
    loader: Loader,
    mesh: Mesh | None,
    notice: Notice,
) -> TextToImage:
    """Runs all steps that are left; the trained model."""
    if isinstance(inputs, Cache):
        model, autoencoder = TextToImage(transformer, None), models.autoencoder
    else:
        model, autoencoder = TextToImage(transformer, inputs.text_encoder), inputs.autoencoder
    trainer, trained = make_trainer(config, model, autoencoder, mesh)
    state = trainer.begin(trained)
    with Checkpoints(
        config.run_dir, keep=config.keep_checkpoints, frozen=trainer.frozen.model
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
        state = _loop(config, models, sampler, trainer, state, loader, checkpoints, mesh, notice)
    return trainer.merge(state.best)


def _loop(
    config: TrainConfig,
    models: RunModels,
    sampler: Pipeline | None,
    trainer: Trainer,
    state: TrainState,
    loader: Loader,
    checkpoints: Checkpoints,
    mesh: Mesh | None,
    notice: Notice,
) -> TrainState:
    start = int(state.step)
    before: Step | None = None
    log = _log(config, models, start) if is_first() else None
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
            if sampler is not None and number % config.sample_every == 0:
                _install(sampler, trainer.merge(state.best))
                _sample(config, sampler, log, number)
        if before is not None:
            report(before)
        checkpoints.wait()
    return state


def _log(config: TrainConfig, models: RunModels, start: int) -> RunLog:
    chip = chip_of(jax.devices()[0].device_kind)
    return RunLog(
        config.run_dir,
        start=start,
        steps=config.steps,
        samples_per_step=config.data.batch_size * config.grad_accumulation,
        flops_per_step=models.step_flops,
        peak_flops=None if chip is None else chip.flops * jax.device_count(),
    )


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
    if log is None or not isinstance(pictures, list):
        return  # the processes draw together, and the first keeps the pictures
    grid = caption_grid(pictures, prompts)
    folder = config.run_dir / "samples"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"{step:07d}.png")
    log.image(step, "samples", np.asarray(grid))


def _finish(
    config: TrainConfig,
    models: RunModels,
    trained: TextToImage,
    inputs: InputModels | Cache,
    mesh: Mesh | None,
) -> None:
    """Writes what was trained, and measures it where asked for."""
    if config.lora is not None:
        _write_lora(config, trained.transformer)
        if config.evaluate is None:
            return
    if isinstance(inputs, Cache):  # training from it does without them
        inputs = models.load_inputs(mesh)
    pipeline = models.pipeline(trained.transformer, inputs, mesh)
    if trained.text_encoder is not None:
        pipeline.text_encoder = trained.text_encoder
    if config.lora is None:
        pipeline.save(config.run_dir / "model", dtype="bfloat16")
        if is_first():
            print(f"model written to {config.run_dir / 'model'}")
    if config.evaluate is not None:
        evaluate_shapes(
            pipeline,
            config.evaluate,
            config.run_dir,
            taca=config.taca,
            lora=config.lora is not None,
        )


def _write_lora(config: TrainConfig, transformer: nnx.Module) -> None:
    graph, factors, others = nnx.split(transformer, LoRAParam, ...)
    if jax.process_count() > 1:  # each holds a part of them
        factors = jax.tree.map(on_host, factors)
    if is_first():
        write_lora(config.run_dir / "lora.safetensors", nnx.merge(graph, factors, others))
        print(f"LoRA written to {config.run_dir / 'lora.safetensors'}")
