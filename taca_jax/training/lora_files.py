"""The LoRA files that a training run leaves: at its end, and at its newest checkpoints."""

import re

import jax
from flax import nnx

from taca_jax.nn.layers import LoRAParam
from taca_jax.parallel.processes import is_first, on_host
from taca_jax.storage.places import Place
from taca_jax.training.models import RunModels
from taca_jax.weights.lora_files import write_lora

FOLDER = "loras"
"""In a run's folder: the LoRA at each of the newest checkpoints."""

FILE = "lora.safetensors"
"""In a run's folder: the LoRA at its end."""


def write_final(models: RunModels, transformer: nnx.Module) -> None:
    """Writes the trained LoRA into the run's folder. All processes must call this together."""
    file = models.config.run_dir / FILE
    _write(models, transformer, file)
    if is_first():
        print(f"LoRA written to {file}")


def write_step(models: RunModels, transformer: nnx.Module, step: int) -> None:
    """Writes the LoRA as it is after `step`, and removes all but the newest keep_checkpoints. All
    processes must call this together."""
    folder = models.config.run_dir / FOLDER
    _write(models, transformer, folder / f"step-{step:06d}.safetensors")
    if is_first():
        for old in _steps(folder)[: -models.config.keep_checkpoints]:
            old.unlink()


def _steps(folder: Place) -> list[Place]:
    """The LoRAs in a folder, by step."""
    found = {
        int(match[1]): file
        for file in folder.iterdir()
        if (match := re.fullmatch(r"step-(\d+)\.safetensors", file.name))
    }
    return [found[step] for step in sorted(found)]


def _write(models: RunModels, transformer: nnx.Module, file: Place) -> None:
    graph, factors, others = nnx.split(transformer, LoRAParam, ...)
    if jax.process_count() > 1:  # each process holds a part of the factors
        factors = jax.tree.map(on_host, factors)
    if is_first():
        write_lora(file, nnx.merge(graph, factors, others), gate=models.lora.gate)
