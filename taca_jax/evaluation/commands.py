"""The commands of `taca-eval` (`python -m taca_jax.evaluation`)."""

import dataclasses
import importlib
import sys
from collections.abc import Sequence

from taca_jax.config.command_line import called, parse_cli, say
from taca_jax.config.fields import nearest
from taca_jax.errors import ending_in_one_line
from taca_jax.pipelines.config import GenerateConfig, SamplingConfig
from taca_jax.pipelines.saved import saved_drawing


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: the class of its configuration and the function that takes it, each as
    `module:name`, and a line for the help.

    If the configuration is a SamplingConfig, the command draws, and its presets are those of
    generate.py: it takes what they set of a SamplingConfig's fields. Other commands have no
    presets.
    """

    config: str
    run: str
    purpose: str


_ATTENTION = "taca_jax.evaluation.attention_maps"
_COMPBENCH = "taca_jax.evaluation.compbench"

COMMANDS: dict[str, Command] = {
    "shapes": Command(
        "taca_jax.evaluation.shapes.config:ShapesConfig",
        "taca_jax.evaluation.shapes.evaluate:evaluate_command",
        "how often a model draws shapes as prompts say, at some guidances",
    ),
    "sweep": Command(
        "taca_jax.evaluation.shapes.sweep_config:SweepConfig",
        "taca_jax.evaluation.shapes.sweep:sweep",
        "the same for many settings of TACA, LoRAs and guidance",
    ),
    "attention": Command(
        f"{_ATTENTION}.config:AttentionConfig",
        f"{_ATTENTION}.command:run",
        "what TACA does to attention: shares on text, maps, pictures",
    ),
    "recogniser": Command(
        "taca_jax.evaluation.shapes.recogniser_error:RecogniserConfig",
        "taca_jax.evaluation.shapes.recogniser_error:measure_recogniser",
        "how often the recogniser of shapes errs, on damaged pictures too",
    ),
    "compbench generate": Command(
        f"{_COMPBENCH}.config:PicturesConfig",
        f"{_COMPBENCH}.generate:generate",
        "draws the pictures of T2I-CompBench",
    ),
    "compbench score": Command(
        f"{_COMPBENCH}.config:ScoreConfig",
        f"{_COMPBENCH}.score:score",
        "scores them by BLIP-VQA and CLIPScore",
    ),
    "compbench sweep": Command(
        f"{_COMPBENCH}.config:SweepConfig",
        f"{_COMPBENCH}.sweep:sweep",
        "both for many settings of TACA: finds gamma and threshold",
    ),
    "compbench report": Command(
        f"{_COMPBENCH}.config:ReportConfig",
        f"{_COMPBENCH}.report:report",
        "shows the scores of runs beside the paper's",
    ),
}


def main(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Runs one command, by default that of this process; problems are one line on stderr.

    program: how the program is called, for the help; by default the file that runs.
    """
    with ending_in_one_line("stopped; the same command keeps what is written and does the rest"):
        run(sys.argv[1:] if argv is None else argv, program or called())


def run(argv: Sequence[str], program: str = "taca-eval") -> None:
    """Runs the command line `COMMAND [--config NAME] [key=value ...]`.

    Raises UserError for problems that the user can fix; a line that cannot be parsed is reported
    and ends the program with status 2.
    """
    if not argv or argv[0] in ("-h", "--help"):
        say([_help(program)])
        raise SystemExit(0)
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1  # "compbench score" is one command
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        there = ", ".join(nearest(name, list(COMMANDS)))
        print(f"error: unknown command {name}; there are {there}", file=sys.stderr)
        raise SystemExit(2)
    command = COMMANDS[name]
    kind = _named(command.config)
    config = parse_cli(
        rest,
        kind,
        attribute="GENERATE" if issubclass(kind, SamplingConfig) else None,
        preset_kind=GenerateConfig,
        saved=saved_drawing,
        program=f"{program} {name}",
    )
    # Imported only now: these take seconds, as in train.py.
    _named("taca_jax.telling.command:begin")()
    _named(command.run)(config)


def _help(program: str) -> str:
    lines = [f"usage: {program} COMMAND [--config NAME] key=value ...", ""]
    width = max(map(len, COMMANDS), default=0)
    lines += [f"  {name:<{width}}  {command.purpose}" for name, command in COMMANDS.items()]
    return "\n".join(
        [*lines, "", "COMMAND --help lists a command's keys, and its presets if it has any"]
    )


def _named(name: str):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
