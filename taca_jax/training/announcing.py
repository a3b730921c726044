"""What is said of a run before its first step."""

from collections.abc import Sequence

import jax
from flax import nnx

from taca_jax.data.order import Bucket
from taca_jax.pipelines.announcing import describe_base
from taca_jax.telling.start import devices_and_mesh, number, say_fact
from taca_jax.training.config import TrainConfig
from taca_jax.training.models import RunModels


def say_models(models: RunModels) -> None:
    """Says on which devices the run computes, and which models it starts from. `models` are on
    their mesh."""
    config = models.config
    say_fact("devices", devices_and_mesh(models.mesh))
    name = "new" if config.base is None else config.base
    # Parameters that are trained are float32, and a frozen base is in the activations' dtype.
    dtype = config.dtype if config.adapts else "float32"
    formats = dtype, config.quantize, config.quantize_text
    say_fact("base", describe_base(name, models.stored, *formats))
    if config.remat == "auto":
        say_fact("remat", models.remat)


def say_data(config: TrainConfig, buckets: Sequence[Bucket]) -> None:
    """Says how many captioned pictures there are, and of which sizes."""
    data = config.data
    pictures = f"{sum(map(len, buckets)):,} pictures with captions"
    sizes = f"{data.resolution} x {data.resolution} px"
    if len(buckets) > 1:
        sizes = f"{len(buckets)} sizes (buckets) of about that area: {sizes}"
    kept = f", encoded in {config.cache_dir}" if data.encode == "cache" else ""
    say_fact("data", f"{', '.join(data.source)}: {pictures}, {sizes}{kept}")


def say_trained(config: TrainConfig, trained: nnx.State) -> None:
    """Says what is trained, for how long, and where it goes."""
    count = number(sum(leaf.size for leaf in jax.tree.leaves(trained)))
    kinds = []
    if config.lora is not None:
        kinds.append(f"a LoRA of rank {config.lora.rank}")
    if config.gamma_knots is not None:
        kinds.append(f"gamma by {config.gamma_knots} knots")
    what = " and ".join(kinds) or "all of the model"
    batch = config.data.batch_size * config.grad_accumulation
    pictures = "1 picture" if batch == 1 else f"{batch} pictures"
    say_fact(
        "trains",
        f"{what}: {count} parameters, {config.steps} steps of {pictures}, into {config.run_dir}",
    )
