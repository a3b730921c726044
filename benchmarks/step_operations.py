"""Where the time of a compiled step goes, operation by operation; no TPU is necessary.

    python -m benchmarks.tpu_plans --rows r64x4-v6e-16 --programs FOLDER
    python -m benchmarks.step_operations FOLDER/r64x4-v6e-16.hlo.gz v6e [--least 0.5] [--code CODE]

For each operation of the program that takes --least percent of the step or more: thousands of
cycles by the compiler's estimate (up to six times too high for elementwise operations, and up to
half for products with elementwise operations in them; our attention kernels' by their measured
cycles), how often it runs in a step, its share of the step; its limit in thousands of cycles, at
the peak of the matrix units or of the memory; MB that it reads and writes; and what of the model it
comes from.

With --code, a folder into which libtpu has written the code of all operations, cycles are counted
in that (`benchmarks.tpu_static`, which says what it leaves out). The folder is filled when the
first command runs with

    LIBTPU_INIT_ARGS="--xla_jf_dump_to=CODE --xla_jf_dump_llo_text=true
      --xla_jf_dump_llo_pass_label_regex=.*(packed-bundles-post-ra|bundle-packing-post-ra|pre-delay_hlo-static).*"

in its environment, on one line.
"""

import argparse
import gzip
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from taca_jax.parallel.chips import CHIPS, Chip
from taca_jax.planning.operations import Operation, operations

HEADER = "| operation | k cycles | times | share | limit | MB | shape | from |"
LONGEST_SOURCE = 80


def described(each: Operation, whole: float, chip: str) -> str:
    """An operation as a row of Markdown; `whole` is the step's time in seconds."""
    clock = CHIPS[chip].clock
    return " | ".join(
        (
            f"| {each.name}",
            f"{each.seconds * clock / 1e3:,.0f}",
            f"{each.times}",
            f"{each.times * each.seconds / whole:.1%}",
            f"{each.limit(CHIPS[chip]) * clock / 1e3:,.0f}",
            f"{each.moved / 1e6:,.0f}",
            " x ".join(map(str, each.shape)),
            f"{each.source[-LONGEST_SOURCE:]} |",
        )
    )


def counted(found: Sequence[Operation], folder: Path, chip: Chip) -> list[Operation]:
    """The operations with the seconds of their code in the folder, the longest first. Operations
    that are alike have one code, dumped under the name of one of them; those without any keep
    their estimates."""
    from benchmarks.tpu_static import analyse_dump  # sets libtpu's environment when it is imported

    def kind(each: Operation) -> tuple:
        return each.shape, each.seconds, each.moved, each.flops

    code = {
        kernel.name: kernel.ms / 1e3
        for kernel in analyse_dump(str(folder), chip, rare_branches=False)
    }
    alike = {kind(each): code[each.name] for each in found if each.name in code}
    timed = [
        replace(each, seconds=code.get(each.name, alike.get(kind(each), each.seconds)))
        for each in found
    ]
    return sorted(timed, key=lambda each: -each.times * each.seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", type=Path, help="its text, as tpu_plans --programs writes it")
    parser.add_argument("chip", choices=CHIPS)
    parser.add_argument("--least", type=float, default=0.5, help="percent of the step")
    parser.add_argument("--code", type=Path, help="the folder with its code, to count cycles in")
    arguments = parser.parse_args(argv)
    opened = gzip.open if arguments.program.suffix == ".gz" else open
    with opened(arguments.program, "rt") as file:
        found = operations(file.read(), CHIPS[arguments.chip])
    if arguments.code is not None:
        found = counted(found, arguments.code, CHIPS[arguments.chip])
    whole = sum(each.times * each.seconds for each in found)
    limit = sum(each.times * each.limit(CHIPS[arguments.chip]) for each in found)
    print(f"{whole:.3f} s together; at each operation's limit {limit:.3f} s")
    print(HEADER)
    print("|---" * (HEADER.count("|") - 1) + "|")
    for each in found:
        if each.times * each.seconds * 100 >= arguments.least * whole:
            print(described(each, whole, arguments.chip))


if __name__ == "__main__":
    main()
