"""What of a repository on a hub is read: the files of pipelines, of single models and of LoRAs.

Copies of the same weights in other formats and precisions are left where they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from taca_jax.autoencoders.tiny_vae_layout import NETS, pair_of
from taca_jax.errors import UserError
from taca_jax.families.registry import families
from taca_jax.formats.lora.alphas import PEFT_CONFIG
from taca_jax.formats.weight_sets import WeightSet, weight_sets
from taca_jax.hub.ids import HubId, Selection, names_in, shown
from taca_jax.scorers.folder import TOKENIZER_FILES
from taca_jax.text.encoders import FOLDERS as TEXT_ENCODERS
from taca_jax.weights.folders import CONFIG, PIPELINE_FILE
from taca_jax.weights.original_pipelines import PIPELINE_PARTS, TOKENIZERS

MODELS = tuple(dict.fromkeys(name for *both, _ in PIPELINE_PARTS for name in both))
"""Folders of models, in diffusers and here."""
_SETTINGS = (PIPELINE_FILE, "model_index.json", "scheduler/scheduler_config.json")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_lora_weights", "adapter_model")
"""Of the weights that libraries themselves write."""


def pipeline_files(found: HubId, names: Sequence[str]) -> Selection:
    """The settings, models and tokenizers of a pipeline folder, converted or of diffusers.

    Of a single file the file, and what a pipeline takes from beside it; of a repository that is no
    pipeline its only model.
    """
    if found.inside in names:
        return Selection((found.inside, *_beside(found.inside, names)), found.inside)
    inside = names_in(found, names, found.inside)
    if not {PIPELINE_FILE, f"transformer/{CONFIG}"} & set(inside):
        return model_files(found, names)
    models = (_model(found, inside, part) for part in MODELS if f"{part}/{CONFIG}" in inside)
    chosen = [*_present(_SETTINGS, inside), *_all_of(models), *_tokenizers(inside)]
    return _selection(found.inside, chosen)


def model_files(found: HubId, names: Sequence[str]) -> Selection:
    """A model's config, weights and tokenizer, or the two files of a tiny autoencoder, which may be
    named by their beginning."""
    if found.inside in names:
        return Selection((found.inside,), found.inside)
    if {*pair_of(found.inside)} <= {*names}:
        return Selection(pair_of(found.inside), found.inside)
    inside = names_in(found, names, found.inside)
    pair = [name for net in NETS for name in inside if name.endswith(f"_{net}.safetensors")]
    if len(pair) == 2 and "/" not in pair[0]:
        stem = pair[0].removesuffix(f"_{NETS[0]}.safetensors")
        return _selection(found.inside, pair, stem)
    weights = _only(found, inside)
    if CONFIG not in inside:
        return _selection(found.inside, weights.files, weights.entry)
    beside = _present((CONFIG, *TOKENIZER_FILES), inside)
    return _selection(found.inside, [*beside, *weights.files])


def lora_files(found: HubId, names: Sequence[str]) -> Selection:
    """The only weights, in one file, and PEFT's config beside them, which has their alpha."""
    if found.inside in names:
        config = PurePosixPath(found.inside).with_name(PEFT_CONFIG).as_posix()
        return Selection((found.inside, *_present([config], names)), found.inside)
    inside = names_in(found, names, found.inside)
    weights = _only(found, inside)
    return _selection(
        found.inside, [*weights.files, *_present([PEFT_CONFIG], inside)], weights.entry
    )


def tokenizer_folders(found: HubId, names: Sequence[str]) -> Selection:
    """The tokenizers of a pipeline. Raises UserError if there are none."""
    chosen = _tokenizers(names_in(found, names, found.inside))
    if not chosen:
        raise UserError(f"{found} has no {' nor '.join(TOKENIZERS)}; name a pipeline that has them")
    return _selection(found.inside, chosen)


def _beside(file: str, names: Sequence[str]) -> list[str]:
    """What is in a single file's folder of the parts that the file may lack."""
    folder = PurePosixPath(file).parent
    inside = [
        PurePosixPath(name).relative_to(folder).as_posix()
        for name in names
        if PurePosixPath(name).is_relative_to(folder)
    ]
    known = [family.original.autoencoder_file for family in families()]
    own = _present((each for each in known if each is not None), inside)
    parts = (*(() if own else ("vae",)), *TEXT_ENCODERS)
    found = HubId(str(folder))
    models = (_model(found, inside, part) for part in parts if f"{part}/{CONFIG}" in inside)
    chosen = [*own, *_all_of(models), *_tokenizers(inside)]
    return [(folder / name).as_posix() for name in chosen]


def _model(found: HubId, inside: Sequence[str], part: str) -> list[str]:
    """The config and the weights of a part of a pipeline, which is a folder."""
    own = [name.removeprefix(f"{part}/") for name in inside if name.startswith(f"{part}/")]
    sets = weight_sets([name for name in own if "/" not in name])
    if not sets and part != "autoencoder":  # pixels have no weights
        raise UserError(f"{found.repo} has no .safetensors in {part}; it has {shown(own)}")
    chosen = [each for each in sets if each.stem in _STEMS] or sets
    files = [CONFIG, *(name for each in chosen for name in each.files)]
    return [f"{part}/{name}" for name in files]


def _only(found: HubId, inside: Sequence[str]) -> WeightSet:
    """The weights at the top of a repository or folder.

    Raises UserError if there are none, or several of which none has a library's name.
    """
    top = weight_sets([name for name in inside if "/" not in name])
    libraries = [each for each in top if each.stem in _STEMS]
    choices = libraries if len(libraries) == 1 else top
    if len(choices) == 1:
        return choices[0]
    if choices:
        listed = shown([each.entry for each in choices])
        raise UserError(
            f"{found} has several weights ({listed}); name one: {replace(found, inside='FILE')}"
        )
    folders = {name.rpartition("/")[0] for name in inside if name.endswith(".safetensors")}
    if folders:
        raise UserError(
            f"{found} has weights in folders only ({shown(sorted(folders))}); name one: "
            f"{replace(found, inside='FOLDER')}"
        )
    raise UserError(f"{found} has no .safetensors; it has {shown(sorted(inside))}")


def _tokenizers(inside: Sequence[str]) -> list[str]:
    return [name for name in inside if name.rpartition("/")[0] in TOKENIZERS]


def _present(wanted: Iterable[str], inside: Sequence[str]) -> list[str]:
    return [name for name in wanted if name in inside]


def _all_of(models: Iterable[Iterable[str]]) -> list[str]:
    return [name for model in models for name in model]


def _selection(folder: str, chosen: Iterable[str], opened: str = "") -> Selection:
    root = PurePosixPath(folder)
    return Selection(
        tuple((root / name).as_posix() for name in chosen),
        (root / opened).as_posix() if opened else folder,
    )
