"""Exports the LoRA of any checkpoint of a training run: `python -m convert export --step`."""

from pathlib import Path

from taca_jax.errors import UserError
from taca_jax.nn.kinds import shapes_of
from taca_jax.weights.lora_files import Layout, save_adapter
from taca_jax.weights.pipeline_folders import open_pipeline
from taca_jax.weights.run_checkpoints import lora_at
from taca_jax.weights.run_folders import settings_of_run, steps_of_run


def export_lora(run: Path, dst: Path, to: Layout, step: int | None) -> list[str]:
    """Writes the LoRA that a run had at `step`, or at its newest checkpoint, as training writes it
    at the end: with its metadata, and the moving average where there is one.

    Returns lines to print. Raises UserError, with nothing at `dst`, for a run that trains no LoRA,
    for a step without a checkpoint, and for a `dst` that exists.
    """
    if dst.exists():
        raise UserError(f"{dst} exists; give a new name or remove it")
    settings, steps = settings_of_run(run), steps_of_run(run)
    lora = settings.get("lora")
    if lora is None:
        raise UserError(
            f"{run} trains no LoRA, whose checkpoints could be exported; give the folder of its "
            f"model ({run / 'model'}), which is there at its end"
        )
    if not steps:
        raise UserError(f"{run} has no checkpoint yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"{run} has checkpoints of steps {', '.join(map(str, steps))}, not {step}")
    stored = open_pipeline(settings["base"])
    config = stored.transformer.config
    adapter = lora_at(run, step, lora["alpha"] / lora["rank"])
    outputs = {path.removesuffix(".kernel"): shape[-1] for path, shape in shapes_of(config).items()}
    gate = "always" if settings.get("taca") is None else "taca"
    written = save_adapter(dst, adapter, to, stored.family, outputs, config=config, gate=gate)
    return [f"{dst}: {written}, of step {step} of {run}"]
