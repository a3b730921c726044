"""What a family of models provides. The rest of the package refers to no family by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.formats.key_table import Table
from taca_jax.formats.lora.dialect import Dialect
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import Tensors
from taca_jax.nn.blocks import kept_products
from taca_jax.nn.kinds import ModelKind
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text.encoders import StoredEncoders, TextReading

Config = Any
"""A config of the family's own subclass of TransformerConfig."""


@dataclass(frozen=True)
class CallDefaults:
    """Defaults of a pipeline call.

    text_length: tokens that T5, or Qwen3, reads. resolution: pixels per side. steps: of sampling.
    guidance: the guidance scale, embedded or classifier-free.
    """

    text_length: int
    resolution: int
    steps: int
    guidance: float


@dataclass(frozen=True)
class Published:
    """A released model.

    name: its common name. transformer: its config. text_encoders: their configs, by folder name.
    repo: its id on the hub, where it is in diffusers' layout.
    """

    name: str
    transformer: Config
    text_encoders: Mapping[str, Any]
    repo: str | None = None


@dataclass(frozen=True)
class DiffusersLayout:
    """How diffusers stores the transformer and its scheduler.

    class_name: `_class_name` in its config.json. config_of, settings_of: convert that file to a
    config and back. table_of: the key table of a config. schedule_of: the noise levels of a
    scheduler_config.json.
    """

    class_name: str
    config_of: Callable[[Settings], Config]
    settings_of: Callable[[Config], Mapping[str, Any]]
    table_of: Callable[[Config], Table]
    schedule_of: Callable[[Settings], FlowSchedule]


@dataclass(frozen=True)
class OriginalLayout:
    """The single-file layout of the family's authors, which ComfyUI uses too.

    author: of the layout. prefixes: possible prefixes of all names, the most common first.
    recognises: whether names, without a prefix, are of this layout. config_of: infers the config
    from shapes; fields that shapes may not determine are keyword arguments. table_of: the key table
    of a config. text_encoders: prefix of a text encoder's names in the same file -> its folder.
    unknown_fields: config fields that shapes may not determine -> their description.
    autoencoder_prefix: prefix of the family's autoencoder in the same file. autoencoder_file: name
    of the autoencoder's file in the same folder. written_prefix: prefix in files that we write.
    """

    author: str
    prefixes: tuple[str, ...]
    recognises: Callable[[Tensors], bool]
    config_of: Callable[..., Config]
    table_of: Callable[[Config], Table]
    text_encoders: Mapping[str, str]
    unknown_fields: Mapping[str, str] = field(default_factory=dict)
    autoencoder_prefix: str | None = None
    autoencoder_file: str | None = None
    written_prefix: str = ""

    @property
    def whose(self) -> str:
        """The author's name in the possessive: "Stability AI's"."""
        return f"{self.author}'" if self.author.endswith("s") else f"{self.author}'s"


@dataclass(frozen=True)
class LoRANames:
    """What LoRA files call the transformer's layers.

    targets: default layers for LoRA factors. dialects: of a config, or of None if the model is
    unknown; PEFT's first, then kohya's. model_of: the config of the only released model that a file
    can be for, None if there are several. placeholder_stack: name of the stack that stands for the
    model's stacks of blocks while no config says which of them has a layer; None if names alone
    determine the stack.
    """

    targets: tuple[str, ...]
    dialects: Callable[[Config | None], tuple[Dialect, ...]]
    model_of: Callable[[Tensors], Config | None]
    placeholder_stack: str | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """Everything that is specific to one family of MM-DiTs.

    kind: of its transformers. title: common name of the family. text_encoders: its text encoders,
    in words. tiny_autoencoder: the published one that previews can use.
    read_text: how a model reads prompts with the text encoders that are present; None if it cannot.
    published: released models, by the folder name that presets use. autoencoder: of all of them.
    defaults_of: defaults of calls of a model. schedule_of: noise levels of the released model that
    a config belongs to.
    diffusers, original, lora: names of weights in other layouts.
    attention_pairs: (config, image tokens, text tokens) -> query-key pairs in a forward pass, over
    all layers. layer_tokens: (path of a linear layer, image tokens, text tokens) -> the number of
    tokens of a sample that it processes.
    kept_products: (config, path of a linear layer of a block) -> the share of its products that the
    backward pass can keep, by name (`nn.stacking`).
    last_products: regular expression of the layers whose products nothing else in a block reads.
    embeds_guidance: whether the guidance scale is an input of the transformer.
    skippable_layers: the number of layers that skip-layer guidance can choose from; 0 if it is not
    supported.
    check_grid: (config, rows, columns) of tokens; raises UserError for a grid larger than the
    model's position table.
    with_features: called as the transformer is, with the transformer first and `blocks=`; returns
    the velocity and the image tokens after that many blocks, [b, s, hidden], whose features a
    training run can supervise. None if the family has no such call.
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
    kept_products: Callable[[Config, str], Mapping[str, float]] = lambda _, path: kept_products(
        path
    )
    last_products: str = r".*\.mlp_out"
    embeds_guidance: Callable[[Config], bool] = lambda _: False
    skippable_layers: Callable[[Config], int] = lambda _: 0
    check_grid: Callable[[Config, int, int], None] = lambda *_: None
    with_features: Callable[..., tuple[jax.Array, jax.Array]] | None = None

    @property
    def name(self) -> str:
        """Its name in commands and in config.json."""
        return self.kind.name
