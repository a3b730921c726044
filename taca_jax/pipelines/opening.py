"""From a stored pipeline to its models on devices: where they go, and whether all at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from taca_jax.errors import UserError
from taca_jax.nn.low_bit import Quantization
from taca_jax.parallel.choice import Place, choose_place, drawing_meshes
from taca_jax.parallel.mesh import MeshConfig, check_heads, make_mesh
from taca_jax.pipelines.stages import Staged, Turn
from taca_jax.pipelines.text import encoder_options, load_encoders, load_tokenizers
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.weights.abstract import abstract_on_mesh, local_bytes
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import AUTOENCODER, StoredPipeline


@dataclass(frozen=True)
class Parts:
    """The models of a pipeline on devices, each of them or what reads it; None where it lacks one.

    mesh: None is the first device alone.
    """

    transformer: Any
    text_encoder: Any
    tokenizer: Tokenizer | None
    autoencoder: Any
    mesh: Mesh | None


def samples_of(stored: StoredPipeline, pictures: int = 1, guidance: float | None = None) -> int:
    """How many samples the transformer is given at a time to draw so many pictures: twice as many
    with classifier-free guidance. `guidance` None is the model's own."""
    guidance = stored.settings.guidance if guidance is None else guidance
    guided = guidance > 1 and not stored.family.embeds_guidance(stored.transformer.config)
    return 2 * pictures if guided else pictures


def open_parts(
    stored: StoredPipeline,
    options: LoadOptions,
    quantize_text: Quantization,
    mesh: Mesh | MeshConfig | None,
    *,
    stages: bool | None,
    samples: int | None,
) -> Parts:
    """The models of a pipeline, as `Pipeline.from_pretrained` describes its arguments.

    options: the transformer's, of which `mesh` is not read. Raises UserError for models that do not
    fit together, and for a mesh that fits neither the devices nor the transformer.
    """
    config, reading = stored.transformer.config, stored.reading
    autoencoder = stored.models.get(AUTOENCODER)
    if autoencoder is not None:
        given, expected = autoencoder.config.latent_channels, config.latent_channels
        if given != expected:
            raise UserError(
                f"{autoencoder.where} has {given} latent channels, the transformer expects "
                f"{expected}; it is of another model"
            )
    tokenizer = None if reading is None else load_tokenizers(stored, reading)
    other = replace(options, quantize="none", remat="none", attention="auto")
    text = replace(other, quantize=quantize_text)
    folders = () if reading is None else reading.folders

    def model_bytes(mesh: Mesh | None) -> dict[str, int]:
        def held(configs: Sequence[Any], options: LoadOptions) -> int:
            models = [
                abstract_on_mesh(each, replace(encoder_options(each, options), mesh=mesh))
                for each in configs
            ]
            return local_bytes(nnx.state(models))

        return {
            "text encoders": held([stored.models[folder].config for folder in folders], text),
            "transformer": held([config], options),
            "autoencoder": held([] if autoencoder is None else [autoencoder.config], other),
        }

    if isinstance(mesh, MeshConfig):
        devices = jax.devices()
        samples = samples_of(stored) if samples is None else samples
        wanted = drawing_meshes(mesh, len(devices), samples, config.num_heads)
        meshes = [make_mesh(each, devices) for each in wanted]
        meshes = meshes if len(devices) > 1 else [None]
    else:
        meshes = [mesh]
    place = choose_place(meshes, model_bytes, stages=stages)
    check_heads(place.mesh, config.num_heads)
    options, text, other = (replace(each, mesh=place.mesh) for each in (options, text, other))
    loaders: list[tuple[Any, Callable[[], Any]] | None] = [
        None
        if reading is None or tokenizer is None
        else (None, lambda: load_encoders(stored, reading, text, tokenizer)),
        (config, lambda: stored.transformer.load(options)),
        None if autoencoder is None else (autoencoder.config, lambda: autoencoder.load(other)),
    ]
    return _parts(loaders, tokenizer, place)


def _parts(
    loaders: Sequence[tuple[Any, Callable[[], Any]] | None],
    tokenizer: Tokenizer | None,
    place: Place,
) -> Parts:
    turn = Turn()
    text_encoder, transformer, autoencoder = (
        None if each is None else Staged(*each, turn) if place.stages else each[1]()
        for each in loaders
    )
    return Parts(transformer, text_encoder, tokenizer, autoencoder, place.mesh)
