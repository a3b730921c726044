"""From a stored pipeline to its models on devices: where they go, and whether all at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from taca_jax.errors import UserError
from taca_jax.nn.low_bit import Quantization
from taca_jax.parallel.choice import Place, choose_place, drawing_meshes
from taca_jax.parallel.mesh import MeshConfig, check_heads, make_mesh
from taca_jax.pipelines.inputs import downscale_of, image_tokens, picture_size
from taca_jax.pipelines.stages import Staged, Turn
from taca_jax.pipelines.text import encoder_options, load_encoders, load_tokenizers
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.weights.abstract import abstract_on_mesh, local_bytes
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import AUTOENCODER, StoredModel, StoredPipeline


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


def downscale_in(stored: StoredPipeline) -> int:
    """Pixels per latent position."""
    autoencoder = stored.models.get(AUTOENCODER)
    own = None if autoencoder is None else autoencoder.config
    return downscale_of(stored.transformer.config, own)


def size_in(stored: StoredPipeline, height: int | None, width: int | None) -> tuple[int, int]:
    """The (height, width) in pixels of a picture; a side that is not given is the model's own."""
    return picture_size(height, width, stored.settings.resolution)


def tokens_in(stored: StoredPipeline, height: int | None, width: int | None) -> int:
    """How many image tokens a picture has. Raises UserError for a size that the model does not
    draw."""
    size = size_in(stored, height, width)
    return image_tokens(stored.transformer.config, size, downscale_in(stored))


def check_autoencoder(stored: StoredPipeline) -> None:
    """Raises UserError for an autoencoder of other latents than the transformer's."""
    autoencoder = stored.models.get(AUTOENCODER)
    if autoencoder is None:
        return
    given = autoencoder.config.latent_channels
    expected = stored.transformer.config.latent_channels
    if given != expected:
        raise UserError(
            f"{autoencoder.where} has {given} latent channels, the transformer expects {expected}; "
            "it is of another model"
        )


@dataclass(frozen=True)
class Opening:
    """A stored pipeline and how its models are loaded.

    options: the transformer's, of which `mesh` is not read. quantize_text: of T5's kernels.
    """

    stored: StoredPipeline
    options: LoadOptions
    quantize_text: Quantization = "none"

    def place(
        self,
        mesh: Mesh | MeshConfig | None,
        devices: Sequence[Any],
        *,
        stages: bool | None = None,
        samples: int | None = None,
    ) -> Place:
        """Where the models go, as `Pipeline.from_pretrained` describes the arguments; `devices` are
        those that a MeshConfig is about.

        Raises UserError for a mesh that fits neither the devices nor the transformer.
        """
        heads = self.stored.transformer.config.num_heads
        meshes = [mesh] if not isinstance(mesh, MeshConfig) else []
        if isinstance(mesh, MeshConfig):
            samples = samples_of(self.stored) if samples is None else samples
            for each in drawing_meshes(mesh, len(devices), samples, heads):
                meshes.append(make_mesh(each, devices))
        place = choose_place(meshes, self.model_bytes, stages=stages)
        check_heads(place.mesh, heads)
        return place

    def model_bytes(self, mesh: Mesh | None) -> dict[str, int]:
        """The bytes of each model's parameters that one device of a mesh holds."""
        return {
            name: local_bytes([nnx.state(model) for model in models])
            for name, models in self.abstract(mesh).items()
        }

    def abstract(self, mesh: Mesh | None) -> dict[str, list[Any]]:
        """The models on a mesh, with shapes in place of arrays."""
        configs = {
            "text encoders": [self.stored.models[folder].config for folder in self._text_folders],
            "transformer": [self.stored.transformer.config],
            "autoencoder": [] if self._autoencoder is None else [self._autoencoder.config],
        }
        options = {
            "text encoders": self._text_options,
            "transformer": self.options,
            "autoencoder": self._other_options,
        }
        return {
            name: [
                abstract_on_mesh(each, replace(encoder_options(each, options[name]), mesh=mesh))
                for each in found
            ]
            for name, found in configs.items()
        }

    def parts(self, place: Place) -> Parts:
        """The models at a place: loaded, or in stages what loads them.

        Raises UserError for models that are damaged or do not fit together.
        """
        check_autoencoder(self.stored)
        stored, reading, autoencoder = self.stored, self.stored.reading, self._autoencoder
        tokenizer = None if reading is None else load_tokenizers(stored, reading)
        transformer, text, other = (
            replace(each, mesh=place.mesh)
            for each in (self.options, self._text_options, self._other_options)
        )
        turn = Turn()

        def part(config: Any, load: Callable[[], Any]) -> Any:
            return Staged(config, load, turn) if place.stages else load()

        text_encoder = None
        if reading is not None and tokenizer is not None:
            text_encoder = part(None, lambda: load_encoders(stored, reading, text, tokenizer))
        return Parts(
            part(stored.transformer.config, lambda: stored.transformer.load(transformer)),
            text_encoder,
            tokenizer,
            None
            if autoencoder is None
            else part(autoencoder.config, lambda: autoencoder.load(other)),
            place.mesh,
        )

    @property
    def _autoencoder(self) -> StoredModel | None:
        return self.stored.models.get(AUTOENCODER)

    @property
    def _text_folders(self) -> tuple[str, ...]:
        reading = self.stored.reading
        return () if reading is None else reading.folders

    @property
    def _text_options(self) -> LoadOptions:
        return replace(self._other_options, quantize=self.quantize_text)

    @property
    def _other_options(self) -> LoadOptions:
        return replace(self.options, quantize="none", remat="none", attention="auto")
