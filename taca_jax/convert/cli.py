"""The command line of `taca-convert` (`python -m convert` in a checkout)."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args

import taca_jax.convert
from taca_jax.config.command_line import called, say
from taca_jax.config.fields import nearest, unknown, value_of
from taca_jax.convert.exporting import Layout as ExportLayout
from taca_jax.convert.exporting import export
from taca_jax.convert.inspection import inspect_weights
from taca_jax.convert.loras import convert_lora, lora_models
from taca_jax.convert.models import convert_family, convert_model, convert_scorer
from taca_jax.convert.verification import verify
from taca_jax.errors import UserError, ending_in_one_line
from taca_jax.families.base import Family
from taca_jax.families.registry import families
from taca_jax.hub.ids import Select
from taca_jax.telling.quiet import plain_log
from taca_jax.text.clip import Activation
from taca_jax.weights.hub_files import lora_files, model_files, pipeline_files
from taca_jax.weights.lora_files import Layout as LoRALayout
from taca_jax.weights.originals import blip_vqa, clip, clip_score, qwen3, t5, tiny_vae, vae
from taca_jax.weights.run_folders import is_run
from taca_jax.weights.shipped import find_weights

DTYPES = ("float32", "bfloat16", "float16")

SHARD_GB = 10.0


class _Parser(argparse.ArgumentParser):
    """Raises UserError for errors, which argparse would print after the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.rpartition(' ')[2]}: {message}")


class _Once(argparse.Action):
    """Raises UserError for an option that is given twice; argparse would keep the last value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = namespace.__dict__.setdefault("_given", set())
        if self.dest in given:
            raise UserError(f"{option_string} is given twice; keep one")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Adds every command with its options, and the function to call as `run` in the namespace."""
    added = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def command(name: str, about: str, run: Callable[..., list[str]]) -> argparse.ArgumentParser:
        made = added.add_parser(name, help=about.partition("\n")[0], description=about)
        made.register("action", None, _Once)
        made.set_defaults(run=run)
        return made

    def paths(
        made: argparse.ArgumentParser, src: str, dst: str, select: Select = pipeline_files
    ) -> None:
        made.set_defaults(select=select)
        made.add_argument("--src", type=Path, required=True, help=f"{src}; or a hub id of it")
        made.add_argument("--dst", type=Path, required=True, help=dst)

    def conversion(
        name: str,
        about: str,
        src: str,
        run: Callable[..., list[str]],
        select: Select = model_files,
    ) -> argparse.ArgumentParser:
        made = command(name, about, run)
        paths(made, src, "the folder to make; must be new or empty", select)
        made.add_argument(
            "--dtype",
            choices=DTYPES,
            help="what to store parameters in; by default as they are, and bfloat16 for float8",
        )
        return made

    for family in families():
        _family(conversion, family)
    conversion(
        "t5",
        "A T5 v1.1 encoder from a transformers folder or a single file to a model folder.",
        "the folder with config.json and the safetensors, or the weights alone "
        "(t5xxl_fp16.safetensors), from which the sizes are read",
        partial(convert_model, t5),
    )
    conversion(
        "qwen3",
        "The layers of a Qwen3 that are read, from a transformers folder or a single file to a "
        "model folder.",
        "the folder with config.json and the safetensors, or the weights alone "
        "(qwen_3_4b.safetensors), from which the sizes are read",
        partial(convert_model, qwen3),
    )
    made = conversion(
        "clip",
        "A CLIP text encoder from a transformers folder or a single file to a model folder.",
        "the folder with config.json and the safetensors, or the weights alone "
        "(clip_l.safetensors, clip_g.safetensors), from which the sizes are read",
        partial(convert_model, clip),
    )
    made.add_argument(
        "--num-heads",
        type=int,
        help="attention heads, for weights alone that are neither CLIP-L nor CLIP-bigG",
    )
    made.add_argument(
        "--activation",
        choices=get_args(Activation),
        help="quick_gelu for OpenAI's models, gelu for OpenCLIP's; for the same weights",
    )
    made = conversion(
        "vae",
        "An autoencoder from a diffusers folder or a single file to a model folder.",
        "the folder with config.json and the safetensors, or a file in the original's layout "
        "(ae.safetensors, or a whole checkpoint)",
        partial(convert_model, vae),
    )
    made.add_argument(
        "--latents",
        choices=[family.name for family in families()],
        help="whose scale and shift the latents have, for a file that does not say",
    )
    conversion(
        "tiny_vae",
        "TAEF1 or TAESD3 from its two published files, or diffusers' folder, to a model folder.",
        "DIR/taef1 for DIR/taef1_encoder.safetensors and DIR/taef1_decoder.safetensors, or DIR if "
        "it has one such pair, or is of diffusers",
        partial(convert_model, tiny_vae),
    )
    conversion(
        "clip_score",
        "A whole CLIP, with both towers and its tokenizer, to a scorer's folder.",
        "the transformers folder with config.json and the safetensors (clip-vit-base-patch32)",
        partial(convert_scorer, clip_score),
    )
    conversion(
        "blip_vqa",
        "BLIP for questions about pictures, with its tokenizer, to a scorer's folder.",
        "the transformers folder with config.json and the safetensors (blip-vqa-capfilt-large), or "
        "the weights of the authors' .pth file (model_base_vqa_capfilt_large) as safetensors",
        partial(convert_scorer, blip_vqa),
    )
    made = command(
        "lora",
        "A LoRA file from one layout to another.\n\nWhat SRC is in is recognised: PEFT or "
        "diffusers, kohya (lora_unet_, lora_transformer_), ComfyUI, the models' authors, fal, "
        "XLabs, or our own. Text encoders' factors are left out, and named.",
        convert_lora,
    )
    paths(
        made,
        "the safetensors file, or the folder with it (PEFT's adapter_model.safetensors)",
        "the safetensors file to make; must not exist",
        lora_files,
    )
    made.add_argument(
        "--to",
        choices=get_args(LoRALayout),
        required=True,
        help="peft: a tensor for each layer in diffusers' names, read by diffusers and PEFT. "
        "kohya: lora_unet_..., read by ComfyUI and most others. native: our names, all layers of "
        "a kind in one array. Alpha is folded into the factors in all",
    )
    made.add_argument(
        "--model",
        choices=list(lora_models()),
        help="what it was trained for; by default what its names and widths are of. Asked for "
        "where those do not tell",
    )
    made = command(
        "export",
        "A converted or trained model to what others read, or a LoRA from a run's checkpoint.\n\n"
        "Of a pipeline folder all models that have a layout there. Of the folder of a training run "
        "the LoRA as it was at one of its checkpoints.",
        _export,
    )
    paths(
        made,
        "the model folder, the pipeline folder, or the folder of a training run",
        "the folder to make, new or empty; with --to original, or of a run, the safetensors file",
    )
    made.add_argument(
        "--to",
        choices=(*get_args(ExportLayout), *get_args(LoRALayout)),
        help="diffusers (default): a folder with config.json that from_pretrained reads. original: "
        "one file in the names of the model's authors, which ComfyUI reads. Of a run's LoRA: peft "
        "(default), kohya or native, see lora --help",
    )
    made.add_argument(
        "--step",
        type=int,
        help="of a run: the step of the checkpoint to take (default: the newest)",
    )
    made.add_argument("--dtype", choices=DTYPES, help="what to store tensors in; else as they are")
    made.add_argument(
        "--shard-gb",
        type=float,
        default=SHARD_GB,
        help=f"longest file of a folder in GB (default: {SHARD_GB:g}); what is longer becomes "
        "several with an index",
    )
    made = command(
        "inspect",
        "Says what a file or folder is: layout, model, config, dtype, size; of a LoRA its targets.",
        inspect_weights,
    )
    made.set_defaults(select=None)
    made.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="a safetensors file, or a folder of a model or a pipeline, converted or not; or a hub "
        "id of it, of whose weights only headers are fetched",
    )
    made = command(
        "verify",
        "Compares a converted model or pipeline folder with its source, tensor by tensor.",
        verify,
    )
    paths(made, "what was converted", "what was made of it")
    return dict(added.choices)


def _family(conversion: Callable[..., argparse.ArgumentParser], family: Family) -> None:
    """Adds the command that converts a family's models."""
    author = family.original.author
    made = conversion(
        family.name,
        f"{family.title} to a pipeline folder: all models that are there, tokenizers, sampler.\n\n"
        "A transformer alone becomes a bare model folder.",
        f"diffusers' pipeline folder (transformer/, vae/, ...), a transformer folder, a single "
        f"file of {author} or ComfyUI, with or without autoencoder and text encoders, or a folder "
        "with files of each (side by side, or in unet/, clip/ and vae/)",
        partial(convert_family, family),
        pipeline_files,
    )
    made.add_argument(
        "--tokenizers",
        type=Path,
        help="where SRC has none: the folder of a pipeline that has tokenizer/, or its hub id",
    )
    for name, about in family.original.unknown_fields.items():
        annotation = family.kind.config.__dataclass_fields__[name].type
        made.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="+",
            type=str,
            action=_OfType,
            annotation=annotation,
            help=about,
        )


class _OfType(_Once):
    """Parses several words, or a comma-separated list, as a config field's type."""

    def __init__(self, *arguments: Any, annotation: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._annotation = annotation

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        words = [word for each in values for word in each.split(",") if word]
        said = f"{option_string} {' '.join(values)}"
        value = value_of(self._annotation, words, said)
        super().__call__(parser, namespace, value, option_string)


def _export(
    src: Path, dst: Path, to: Any, step: int | None, dtype: str | None, shard_gb: float
) -> list[str]:
    if not shard_gb > 0:
        raise UserError(f"--shard-gb is {shard_gb}; it must be above 0")
    layouts, lora_layouts = get_args(ExportLayout), get_args(LoRALayout)
    if is_run(src):
        from taca_jax.convert.checkpoints import (
            export_lora,  # here because Orbax takes a second to import
        )

        to = "peft" if to is None else to
        if to not in lora_layouts:
            raise UserError(f"--to {to} is for models; a run's LoRA is {', '.join(lora_layouts)}")
        if dtype is not None:
            raise UserError("--dtype is for models; a run's LoRA is written in float32")
        return export_lora(src, dst, to, step)
    to = "diffusers" if to is None else to
    if to not in layouts:
        raise UserError(f"--to {to} is for a run's LoRA; {src} is no folder of a training run")
    if step is not None:
        raise UserError(f"--step is for a training run; {src} is no folder of one")
    return export(src, dst, to, dtype, int(shard_gb * 1e9))


def parse(words: Sequence[str], program: str = "taca-convert") -> Callable[[], list[str]]:
    """A function that runs the command of this command line and returns lines to print.

    `--help` prints help and exits with status 0. Raises UserError for an invalid command line.
    """
    parser = _Parser(prog=program, description=taca_jax.convert.__doc__)
    commands = _commands(parser)
    if not words:
        raise UserError(f"no command given; there are {', '.join(commands)} (--help says more)")
    name = words[0]
    if name not in commands and name not in ("-h", "--help"):
        others = ", ".join(nearest(name, list(commands)))
        raise UserError(f"unknown command {name}; there are {others}")
    words = [_with_dashes(word) for word in words]
    if name in commands:  # argparse would first report what is missing instead
        options = [flag for flag in commands[name]._option_string_actions if flag != "-h"]
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            if flag not in options:
                raise UserError(unknown(flag, options, f"option of {name}:"))
    found, left = parser.parse_known_args(words)
    if left:
        raise UserError(f"{name} has no use for {left[0]}; options are written --name VALUE")
    used = ("run", "select", "_given")
    values = {key: value for key, value in vars(found).items() if key not in used}
    return partial(_run, found.run, found.select, **values)


def _run(run: Callable[..., list[str]], select: Select | None, **values: Any) -> list[str]:
    """Runs a command, with its SRC fetched from the hub if that is where it is; without `select`
    the command itself reads what it needs."""
    if select is not None:
        values["src"] = find_weights(values["src"], select)
    return run(**values)


def _with_dashes(word: str) -> str:
    """`--its_name=VALUE` as `--its-name=VALUE`."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def main(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Runs one command, by default that of this process, and prints its result.

    program: how the program is called, for the help; by default the file that runs.

    Errors print one line, `error: ...`, on stderr, and nothing is written. The exit status is 2 for
    an invalid command line, 1 for bad input and for a checkpoint that differs from its source.
    """
    words = sys.argv[1:] if argv is None else argv
    plain_log()
    try:
        run = parse(words, program or called())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    with ending_in_one_line("stopped; nothing was written"):
        made = run()
    say(made)
