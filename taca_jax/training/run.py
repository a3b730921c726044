"""A training run, from its start or a checkpoint to exported weights and their evaluation."""

import sys
from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from taca_jax.config.json_text import to_json
from taca_jax.data.cache.reader import Cache
from taca_jax.data.loader import Loader
from taca_jax.errors import StoppedError, UserError
from taca_jax.evaluation.shapes.evaluate import evaluate_shapes
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.batches import put_rows
from taca_jax.parallel.chips import chip_of
from taca_jax.parallel.mesh import on
from taca_jax.parallel.processes import (
    do_not_wait_at_exit,
    is_first,
    join_processes,
    print_once,
    wait_for_all,
)
from taca_jax.storage.places import Place
from taca_jax.taca import TacaConfig, describe_gamma
from taca_jax.telling.start import say_fact
from taca_jax.training.announcing import say_models, say_trained
from taca_jax.training.cache_stage import ready_cache
from taca_jax.training.checkpoints import Checkpoints
from taca_jax.training.checks import CheckedRun, check_run
from taca_jax.training.config import TrainConfig
from taca_jax.training.health import Health, Step
from taca_jax.training.inputs import open_examples, open_loader, open_validation
from taca_jax.training.log import RunLog, after
from taca_jax.training.lora_files import write_final, write_step
from taca_jax.training.models import (
    InputModels,
    RunModels,
    TextToImage,
)
from taca_jax.training.record import write_record
from taca_jax.training.samples import Samples
from taca_jax.training.signals import Notice
from taca_jax.training.step import Batch, EncodedBatch, Trainer, TrainState, make_trainer
from taca_jax.training.text_lessons import teach_text
from taca_jax.training.validation import LOSS, Validation
from taca_jax.training.wandb_log import WandbRun
from taca_jax.weights.pipeline_folders import open_pipeline, write_settings


def train(config: TrainConfig, checked: CheckedRun | None = None) -> None:
    """Trains as configured and writes all results into `config.run_dir`.

    checked: of this configuration, if it has been checked already (`check_run`).
    That folder then contains config.json, metrics.jsonl, tensorboard/, checkpoints/, samples/,
    `lora.safetensors` and loras/ (with config.lora) or `model/` (a pipeline folder), and
    `evaluation.json` and `.png` if configured. If there are several processes, all call this and
    the first writes. Raises UserError for problems that the user can fix, and StoppedError after
    SIGTERM, once everything is saved.
    """
    join_processes()
    try:
        run = check_run(config) if checked is None else checked
        say_models(run.models)
        with on(run.models.mesh):
            _run(run, Notice(f"go on with resume=true out_dir={config.run_dir}"))
    except StoppedError:
        raise
    except BaseException:
        do_not_wait_at_exit()
        raise


def _run(run: CheckedRun, notice: Notice) -> None:
    models, config = run.models, run.models.config
    cached = config.data.encode == "cache"
    inputs = ready_cache(models, notice, run.data) if cached else models.load_inputs()
    validated = open_validation(models, inputs, notice)
    if config.teaches_text and isinstance(inputs, InputModels):
        teach_text(models, inputs)
    transformer = models.load_transformer()
    if config.taca is not None:
        say_fact(
            "TACA",
            f"{describe_gamma(config.taca)} at t >= {config.taca.threshold:g}, from which all "
            "training times are drawn",
        )
    if config.optimizer.warmup_steps > config.steps:
        print_once(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is cut to steps="
            f"{config.steps}: the learning rate rises to the end"
        )
    try:
        examples, held_out = open_examples(models, inputs, run.data)
        validated = held_out or validated
        # Before the loader's threads, with which it would share the tokenizer.
        validation = None if validated is None else Validation(models, inputs, validated)
        with open_loader(models, inputs, examples) as loader:
            # Only now, so that a run that cannot start leaves no record behind.
            wait_for_all("a run that can begin")
            if is_first():
                write_record(config)
            trained = _train(models, transformer, inputs, loader, validation, notice)
            for line in loader.skipped():
                print(line, file=sys.stderr)
        _finish(models, trained, inputs)
    except OSError as error:
        raise UserError(
            f"{error.filename or config.run_dir}: {error.strerror or error}; mend that and go on "
            "with resume=true"
        ) from error


def _train(
    models: RunModels,
    transformer: nnx.Module,
    inputs: InputModels | Cache,
    loader: Loader,
    validation: Validation | None,
    notice: Notice,
) -> TextToImage:
    """Runs all remaining steps and returns the trained model."""
    config = models.config
    if isinstance(inputs, Cache):
        model = TextToImage(transformer, None, gamma=models.new_gamma())
        autoencoder = models.autoencoder
    else:
        readout, gamma = models.new_readout(), models.new_gamma()
        model = TextToImage(transformer, inputs.text_encoder, readout, gamma)
        autoencoder = inputs.autoencoder
    trainer, trained = make_trainer(config, model, autoencoder, models.mesh)
    say_trained(config, trained)
    state = trainer.begin(trained)
    with Checkpoints(
        config.run_dir, keep=config.keep_checkpoints, frozen=trainer.frozen.model
    ) as checkpoints:
        if config.resume:
            restored = checkpoints.restore(
                state, warn=lambda line: print_once(f"warning: {line}", sys.stderr)
            )
            if restored is not None:
                state, position = restored
                loader.set_state(position)
                print_once(f"going on after step {int(state.step)}")
        state = _loop(models, inputs, trainer, state, loader, checkpoints, validation, notice)
    return trainer.merge(state.best)


def _loop(
    models: RunModels,
    inputs: InputModels | Cache,
    trainer: Trainer,
    state: TrainState,
    loader: Loader,
    checkpoints: Checkpoints,
    validation: Validation | None,
    notice: Notice,
) -> TrainState:
    config = models.config
    start = int(state.step)
    before: Step | None = None
    log = _log(models, start) if is_first() else None
    health = Health()
    samples = Samples(models, inputs) if config.sample_every else None

    def report(step: Step) -> None:
        health.check(step, state)
        due = step.number % config.log_every == 0 or step.number in (start + 1, config.steps)
        due = due or LOSS in step.metrics
        if log is not None and due:
            log.write(step.number, {name: float(value) for name, value in step.metrics.items()})

    def aside(number: int) -> dict[str, jax.Array]:
        """Validates and draws samples where they are due after a step; returns what to log."""
        found = {}
        with nullcontext() if log is None else log.aside():
            if validation is not None and validation.due(number):
                with nullcontext() if log is None else log.doing("validating"):
                    loss = validation.loss(trainer, state.best)
                found = {LOSS: jnp.float32(loss)}
                if log is not None:
                    log.say(f"validation loss {loss:.4f} {after(number)}")
            if samples is not None and number % config.sample_every == 0:
                with nullcontext() if log is None else log.doing("drawing samples"):
                    samples.draw(trainer.merge(state.best), number, log)
        return found

    with notice.steps(), nullcontext() if log is None else log:
        if start == 0:
            found = aside(0)
            if found and log is not None:
                log.write_first({name: float(value) for name, value in found.items()})
        for number in range(start + 1, config.steps + 1):
            batch, names = _next_batch(loader, config.grad_accumulation, models.mesh)
            state, metrics = trainer.run(state, batch)
            # The previous step's metrics are read while this one runs: the device never waits.
            if before is not None:
                report(before)
            before = Step(number, metrics, names)
            stopping = notice.reached()
            if number % config.save_every == 0 or number == config.steps or stopping:
                # A checkpoint of NaNs would displace the good ones.
                health.check(before)
                checkpoints.save(state, loader.get_state())
                if config.lora is not None:
                    write_step(models, trainer.merge(state.best).transformer, number)
            if stopping:
                report(before)
                checkpoints.wait()
                raise notice.stopped(f"saved after step {number} of {config.steps}")
            if found := aside(number):
                before = replace(before, metrics={**metrics, **found})
        if before is not None:
            report(before)
        checkpoints.wait()
    return state


def _log(models: RunModels, start: int) -> RunLog:
    config = models.config
    chip = chip_of(jax.devices()[0].device_kind)
    return RunLog(
        config.run_dir,
        start=start,
        steps=config.steps,
        samples_per_step=config.data.batch_size * config.grad_accumulation,
        flops_per_step=models.step_flops,
        peak_flops=None if chip is None else chip.flops * jax.device_count(),
        wandb=WandbRun(config) if config.wandb else None,
    )


def _next_batch(
    loader: Loader, parts: int, mesh: Mesh | None
) -> tuple[Batch | EncodedBatch, list[str]]:
    """The batches of all parts of a step as one, and the names of this process's samples in them.

    Each process provides the samples that its devices hold.
    """
    batches = [next(loader) for _ in range(parts)]

    def placed(arrays: list[np.ndarray]) -> jax.Array:
        local = arrays[0][None] if parts == 1 else np.stack(arrays)
        return put_rows(local, mesh, leading=1)

    names = [name for name in batches[0] if name != "id"]
    arrays = {name: placed([batch[name] for batch in batches]) for name in names}
    batch = Batch(**arrays) if "image" in arrays else EncodedBatch(**arrays)
    return batch, [name for batch in batches for name in batch["id"]]


def _finish(models: RunModels, trained: TextToImage, inputs: InputModels | Cache) -> None:
    """Writes what was trained, the LoRA and gamma or the model, and evaluates it if configured."""
    config = models.config
    taca = trained.taca(config)
    if config.lora is not None:
        write_final(models, trained.transformer)
    if config.gamma_knots is not None and taca is not None and is_first():
        _write_gamma(config.run_dir / "taca.json", taca)
    if config.adapts and config.evaluate is None:
        return
    if isinstance(inputs, Cache):  # training did not need the encoders
        inputs = models.load_inputs()
    pipeline = models.pipeline(trained, inputs)
    if not config.adapts:
        pipeline.save(config.run_dir / "model", dtype="bfloat16")
        print_once(f"model written to {config.run_dir / 'model'}")
    if config.evaluate is not None:
        best = evaluate_shapes(
            pipeline,
            config.evaluate,
            config.run_dir,
            taca=taca if config.adapts else None,
            lora=config.lora is not None,
        )
        if not config.adapts and best is not None and is_first():
            _keep_guidance(config.run_dir / "model", best)


def _write_gamma(file: Place, taca: TacaConfig) -> None:
    with whole_file(file) as whole:
        whole.write_text(to_json(taca))
    knots = ",".join(f"{knot:g}" for knot in taca.knots or ())
    settings = f"taca.threshold={taca.threshold:g} taca.knots={knots}"
    print(f"gamma written to {file}; draw with {settings}")


def _keep_guidance(model: Place, guidance: float) -> None:
    """Makes a strength of guidance the default of the model in this folder."""
    settings = open_pipeline(model).settings
    write_settings(model, replace(settings, guidance=guidance))
    print(f"best on seen compositions, and now the model's default: guidance {guidance:g}")
