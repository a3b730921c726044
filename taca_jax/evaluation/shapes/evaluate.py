"""Evaluates a model on shapes: at the end of a training run, and as a command."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from taca_jax.config.json_text import to_json
from taca_jax.evaluation.results import PICTURES, check_base, prepare
from taca_jax.evaluation.shapes.alignment import Alignment, best_guidance, measure, variants
from taca_jax.evaluation.shapes.config import EvalConfig, ShapesConfig
from taca_jax.evaluation.shapes.halves import make_halves
from taca_jax.evaluation.shapes.report import best_prompts, summary, table
from taca_jax.evaluation.shapes.sampler import Sampler
from taca_jax.parallel.processes import is_first
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.generate import check_lora, load_pipeline, local_mesh
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import TacaConfig


def evaluate_shapes(
    pipeline: Pipeline,
    evaluate: EvalConfig,
    run_dir: Path,
    *,
    taca: TacaConfig | None,
    lora: bool,
) -> float | None:
    """Measures `pipeline` at the end of a run, prints the tables, and writes evaluation.json and
    evaluation.png into `run_dir`.

    A base is measured plainly (taca=None); a LoRA that was trained without TACA, with TACA's
    defaults. Returns the best of `evaluate.guidances` on seen compositions; None if there are none.
    """
    measured = (taca or TacaConfig()) if lora else taca
    which = variants(measured, lora=lora, guidances=evaluate.guidances or (None,))
    sampler = Sampler(pipeline, evaluate.batch_size, evaluate.steps)
    alignments, grid = measure(sampler, which, make_halves(evaluate.prompts))
    if is_first():  # all processes sample together, and the first reports
        _report(pipeline, alignments, which, run_dir)
        grid.save(run_dir / "evaluation.png")
    return best_guidance(alignments, which)


def evaluate_command(config: ShapesConfig) -> None:
    """Measures as configured, and writes all results into `config.out`.

    That folder then contains evaluation.json, evaluation.png and in pictures/ all that was drawn,
    from which an interrupted evaluation goes on. Raises UserError for problems that the user can
    fix, and if the folder holds an evaluation of something else.
    """
    out = Path(config.out)
    _check(config, out)
    pipeline = load_pipeline(config, local_mesh())
    which = variants(
        config.taca, lora=config.lora is not None, guidances=config.guidances or (config.guidance,)
    )
    kept = out / PICTURES
    sampler = Sampler(
        pipeline, config.batch_size, config.steps, config.height, config.width, config.seed, kept
    )
    alignments, grid = measure(sampler, which, make_halves(config.prompts, config.num_images))
    _report(pipeline, alignments, which, out)
    grid.save(out / "evaluation.png")
    if config.num_images > 1:
        for alignment in alignments:
            _print(best_prompts(alignment, config.num_images, config.seed))


def _check(config: ShapesConfig, out: Path) -> None:
    """Prepares the folder. Raises UserError as `prepare`, `check_base` and `check_lora` do."""
    check_base(config)
    check_lora(config)
    files = [config.base, *([] if config.used_lora is None else [config.used_lora])]
    prepare(out, json.loads(to_json(config)), files)


def _report(
    pipeline: Pipeline,
    alignments: Sequence[Alignment],
    which: Sequence[Variant],
    folder: Path,
) -> None:
    """Prints a table of each half, and writes both as `folder`/evaluation.json."""
    own = pipeline.settings.guidance
    at = {v.name: own if v.guidance is None else v.guidance for v in which}
    halves = {each.half.name: summary(each, at) for each in alignments}
    (folder / "evaluation.json").write_text(json.dumps(halves, indent=1) + "\n")
    for name, rows in halves.items():
        _print(table(name, rows))
    if len(set(at.values())) > 1:
        best = best_guidance(alignments, which)
        print(f"best on seen compositions: guidance {best:g}; the model's own is {own:g}")


def _print(what: object) -> None:
    Console(width=max(120, Console().width)).print(what)
