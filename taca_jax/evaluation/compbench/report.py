"""`compbench report`: the scores of runs beside those that the paper published."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.categories import METRICS, TABLE
from taca_jax.evaluation.compbench.config import ReportConfig
from taca_jax.evaluation.compbench.published import PUBLISHED, SOURCE
from taca_jax.evaluation.compbench.results import Run, differences, means, read_run
from taca_jax.evaluation.means import Mean, MeanDifference
from taca_jax.formats.atomic import whole_file

_CATEGORIES_A_TABLE = 3
"""As many as 80 columns hold with their intervals."""


def report(config: ReportConfig) -> None:
    """Prints the table, and writes it as JSON if configured. Raises UserError for runs without
    scores, and for runs of different prompts."""
    if config.out is not None and not Path(config.out).parent.is_dir():
        raise UserError(f"out={config.out}: the folder {Path(config.out).parent} does not exist")
    names = config.names or _distinct(config.runs)
    runs = {name: read_run(Path(folder)) for name, folder in zip(names, config.runs, strict=True)}
    tree = summary(runs)
    if config.out is not None:
        with whole_file(Path(config.out)) as file:
            file.write_text(json.dumps(tree, indent=1) + "\n")
    console = Console()
    for each in tables(runs):
        console.print(each)
    for line in notes(runs):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _distinct(folders: Sequence[str]) -> Sequence[str]:
    """The folders' own names, or their whole paths if two have the same."""
    names = [Path(folder).name for folder in folders]
    return names if len(set(names)) == len(names) else folders


def summary(runs: Mapping[str, Run]) -> dict[str, Any]:
    """For JSON: the published means; for each run means with 95 % intervals, what our scorer was
    set to, and the paired differences from the first run."""
    rows: dict[str, Any] = {}
    for name, run in runs.items():
        rows[name] = {
            "means": {each: asdict(mean) for each, mean in means(run).items()},
            "settings": {each: scores.settings for each, scores in run.items()},
        }
        if len(rows) > 1:
            gaps = differences(next(iter(runs.values())), run)
            rows[name]["against_first"] = {each: asdict(gap) for each, gap in gaps.items()}
    return {"published": {"source": SOURCE, "rows": PUBLISHED}, "runs": rows}


def tables(runs: Mapping[str, Run]) -> list[Table]:
    """The published means, those of the runs with 95 % intervals, and the differences of runs; a
    few categories in each table."""
    further = [
        each for each in METRICS if each not in TABLE and any(each in r for r in runs.values())
    ]
    columns = [*TABLE, *further]
    starts = range(0, len(columns), _CATEGORIES_A_TABLE)
    return [_table(runs, columns[start:][:_CATEGORIES_A_TABLE]) for start in starts]


def _table(runs: Mapping[str, Run], columns: Sequence[str]) -> Table:
    out = Table(title="T2I-CompBench: mean scores (95 % intervals; prompts are the units)")
    out.add_column("")
    for column in columns:
        out.add_column(f"{column}\n{METRICS[column].name}", justify="right")
    for name, scores in PUBLISHED.items():
        cells = [f"{scores[each]:.4f}" if each in scores else "" for each in columns]
        out.add_row(f"{name} *", *cells, end_section=name == list(PUBLISHED)[-1])
    for name, run in runs.items():
        found = means(run)
        out.add_row(escape(name), *(mean_text(found.get(each)) for each in columns))
    for name, run in list(runs.items())[1:]:
        first = next(iter(runs))
        gaps = differences(runs[first], run)
        out.add_row(
            escape(f"{name} against {first}"), *(gap_text(gaps.get(each)) for each in columns)
        )
    return out


def mean_text(mean: Mean | None) -> str:
    """A mean and, under it, its interval."""
    if mean is None:
        return ""
    interval = "" if mean.low is None else f"\n({mean.low:.4f} to {mean.high:.4f})"
    return f"{mean.value:.4f}{interval}"


def gap_text(gap: MeanDifference | None) -> str:
    """A difference and, under it, its interval and p-value."""
    if gap is None:
        return ""
    if gap.low is None:
        return f"{gap.value:+.4f}"
    return f"{gap.value:+.4f}\n({gap.low:+.4f} to {gap.high:+.4f})\np = {gap.p_value:.2g}"


def notes(runs: Mapping[str, Run]) -> list[str]:
    """What the table is of: its source, and of each run how much was scored and how."""
    lines = [f"* {SOURCE}"]
    for name, run in runs.items():
        for category, mean in means(run).items():
            settings = run[category].settings
            how = "scored by another program"
            if settings is not None:
                how = ", ".join(f"{key} {value}" for key, value in settings.items())
            lines.append(
                f"{name}, {category}: {mean.total} pictures of {mean.prompts} prompts; {how}"
            )
    return lines
