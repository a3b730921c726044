"""What a family of models provides. Everything else in the package knows no family by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.formats.key_table import Table
from taca_jax.formats.lora.dialect import Dialect
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import Tensors
from taca_jax.nn.kinds import ModelKind
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text.encoders import StoredEncoders, TextReading

Config = Any
"""A config of the family's own class, which derives from TransformerConfig."""


@dataclass(frozen=True)
class CallDefaults:
    """What a pipeline call takes that names nothing.

    text_length: tokens that T5 reads. resolution: pixels per side. steps: of sampling. guidance:
    its strength, embedded or classifier-free.
    """

    text_length: int
    resolution: int
    steps: int
    guidance: float


@dataclass(frozen=True)
class Published:
    """A released model.

    name: what people call it. transformer: its config. text_encoders: their configs, by the folder
    of each. text_length: tokens that T5 reads.
    """

    name: str
    transformer: Config
    text_encoders: Mapping[str, Any]
    text_length: int


@dataclass(frozen=True)
class DiffusersLayout:
    """How diffusers stores the transformer and its scheduler.

    class_name: in its config.json. config_of, settings_of: from that file to a config and back.
    table_of: the key table of a config. schedule_of: noise levels of a scheduler_config.json.
    text_encoders: how many a complete pipeline has.
    """

    class_name: str
    config_of: Callable[[Settings], Config]
    settings_of: Callable[[Config], Mapping[str, Any]]
    table_of: Callable[[Config], Table]
    schedule_of: Callable[[Settings], FlowSchedule]
    text_encoders: int


@dataclass(frozen=True)
class OriginalLayout:
    """How the family's authors, and ComfyUI after them, store the transformer in a single file.

    author: whose names they are. prefixes: what may stand before each name, the likeliest first.
    recognises: whether names, without a prefix, are these. config_of: the config that shapes tell,
    given as keywords what they do not. table_of: the key table of a config. text_encoders: prefix
    of the names of a text encoder in the same file -> its folder. untold: fields of the config that
    shapes may not tell -> what each is. autoencoder_prefix: of an autoencoder in the same file that
    is this family's. autoencoder_file: what the autoencoder beside it is called. written_prefix:
    what stands before each name in files that we write.
    """

    author: str
    prefixes: tuple[str, ...]
    recognises: Callable[[Tensors], bool]
    config_of: Callable[..., Config]
    table_of: Callable[[Config], Table]
    text_encoders: Mapping[str, str]
    untold: Mapping[str, str] = field(default_factory=dict)
    autoencoder_prefix: str | None = None
    autoencoder_file: str | None = None
    written_prefix: str = ""

    @property
    def whose(self) -> str:
        """As in "Stability AI's names"."""
        return f"{self.author}'" if self.author.endswith("s") else f"{self.author}'s"


@dataclass(frozen=True)
class LoRANames:
    """What LoRA files call the transformer's layers.

    targets: layers that get factors where a configuration names none. dialects: of a config, or of
    None where the model is not known; PEFT's first, then kohya's. model_of: the config of the only
    released model that a file can be for, None where there are several. unplaced: the stack in
    which layers are put where no config says which of the model's stacks has them; None where
    names alone say so.
    """

    targets: tuple[str, ...]
    dialects: Callable[[Config | None], tuple[Dialect, ...]]
    model_of: Callable[[Tensors], Config | None]
    unplaced: str | None = None


def _no_guidance(config: Config) -> bool:
    del config
    return False


def _no_layers(config: Config) -> int:
    del config
    return 0


def _any_grid(config: Config, rows: int, columns: int) -> None:
    del config, rows, columns


@dataclass(frozen=True, eq=False)
class Family:
    """A family of MM-DiTs: what is true of it and of no other.

    kind: its transformers. title: what people call the family. text_encoders: what its models read
    prompts with, in words. tiny_autoencoder: the published one that draws previews.
    read_text: how a config reads prompts with the text encoders that are there, or None.
    published: released models, by the folder that presets expect. autoencoder: of all of them.
    defaults_of: what a call of a config's model takes that names nothing. schedule_of: the noise
    levels of the released model that is like a config.
    diffusers, original, lora: names of weights elsewhere.
    attention_pairs: (config, image tokens, text tokens) -> pairs of query and key in a forward
    pass, over all layers. layer_tokens: (path of a linear layer, image tokens, text tokens) -> on
    how many tokens of a sample it acts.
    embeds_guidance: whether the guidance scale is an input of the transformer.
    skippable_layers: of how many layers each can be left out, for skip-layer guidance; 0 for none.
    check_grid: (config, rows, columns) of tokens; raises UserError for a grid that the model has no
    positions for.
    """

    kind: ModelKind
    title: str
    text_encoders: str
    tiny_autoencoder: str
    read_text: Callable[[Config, StoredEncoders], TextReading | None]
    published: Mapping[str, Published]
    autoencoder: VAEConfig
    defaults_of: Callable[[Config], CallDefaults]
    schedule_of: Callable[[Config], FlowSchedule]
    diffusers: DiffusersLayout
    original: OriginalLayout
    lora: LoRANames
    attention_pairs: Callable[[Config, int, int], int]
    layer_tokens: Callable[[str, int, int], int]
    embeds_guidance: Callable[[Config], bool] = _no_guidance
    skippable_layers: Callable[[Config], int] = _no_layers
    check_grid: Callable[[Config, int, int], None] = _any_grid

    @property
    def name(self) -> str:
        """What commands and config.json call it."""
        return self.kind.name
