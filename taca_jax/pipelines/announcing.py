"""What is said of a pipeline and a drawing before it begins, and which values it uses."""

from dataclasses import fields, replace
from math import prod

import jax.numpy as jnp
from flax import nnx

from taca_jax.families.registry import family_of
from taca_jax.nn.kinds import Role, kind_of, shapes_of
from taca_jax.nn.low_bit import Quantization
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.pipelines.batching import with_model_values
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.lora_choice import LoRAChoice, written_loras
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.text import encoder_options
from taca_jax.storage.places import place
from taca_jax.telling.start import devices_and_mesh, listed, number, say_fact, size
from taca_jax.weights.abstract import abstract_on_mesh, local_bytes
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import StoredPipeline


def describe_base(
    name: str,
    stored: StoredPipeline,
    dtype: str,
    quantize: Quantization = "none",
    quantize_text: Quantization = "none",
) -> str:
    """A base in words: its family, the parameters of its models, and their bytes in memory on one
    device. Nothing is loaded."""
    reading = stored.reading
    text = () if reading is None else reading.folders
    counts: dict[Role, int] = {"transformer": 0, "text_encoder": 0, "autoencoder": 0}
    formats: dict[Role, Quantization] = {"transformer": quantize, "text_encoder": quantize_text}
    memory = 0
    for folder, model in stored.models.items():
        role = kind_of(model.config).role
        if role not in counts or (role == "text_encoder" and folder not in text):
            continue
        count = sum(map(prod, shapes_of(model.config).values()))
        counts[role] += count
        memory += _bytes(model.config, count, dtype, formats.get(role, "none"))
    words = [f"{role.replace('_', ' ')} {number(count)}" for role, count in counts.items() if count]
    family = family_of(stored.transformer.config)
    return f"{name} ({family.title}): {listed(words)} parameters, {size(memory)} in memory"


def _bytes(config: object, count: int, dtype: str, to: Quantization) -> int:
    wide = jnp.dtype(dtype)
    if to == "none":
        return count * wide.itemsize
    options = encoder_options(config, LoadOptions(wide, wide, quantize=to))
    return local_bytes(nnx.state(abstract_on_mesh(config, options)))


def say_devices(pipeline: Pipeline) -> None:
    """Says on which devices, and whether in stages, a pipeline draws."""
    turns = "; models take turns in memory: prompts are read, then all is drawn, then decoded"
    say_fact("devices", devices_and_mesh(pipeline.mesh) + (turns if pipeline.staged else ""))


def say_drawing(config: GenerateConfig) -> None:
    """Says what is drawn, in which batches, and where it goes. `config` is `with_values_used`."""
    count, together = config.num_images, config.batch_size
    batches = ""
    if together is not None and together < count:
        batches = f" in batches of {together} (batch_size)"
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    say_fact(
        "draws",
        f"{pictures}{batches} of {config.width} x {config.height} px, {config.steps} steps, "
        f"guidance {config.guidance:g}, seed {config.seed}, into {place(config.out)}",
    )


def with_values_used(config: GenerateConfig, pipeline: Pipeline, batch_size: int) -> GenerateConfig:
    """The configuration with what it leaves to the model and to the devices, as it is used: steps,
    guidance, size, mesh, stages, batch size, and each LoRA's strength and gate."""
    axes = {} if pipeline.mesh is None else dict(pipeline.mesh.shape)
    loras = [LoRAChoice(lora.name, lora.strength, lora.gate) for lora in pipeline.loras]
    return replace(
        with_model_values(config, pipeline.settings),
        mesh=MeshConfig(**{field.name: axes.get(field.name, 1) for field in fields(MeshConfig)}),
        stages=pipeline.staged,
        batch_size=batch_size,
        lora=written_loras(loras),
    )
