"""Evaluates a model on shapes: at the end of a training run, and as a command."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console

from taca_jax.evaluation.digests import digest_of_loras
from taca_jax.evaluation.record import check_record, model_files, write_record
from taca_jax.evaluation.shapes.alignment import Alignment, best_guidance, measure, variants
from taca_jax.evaluation.shapes.base import check_base
from taca_jax.evaluation.shapes.config import EvalConfig, ShapesConfig
from taca_jax.evaluation.shapes.halves import make_halves
from taca_jax.evaluation.shapes.report import best_prompts, summary, table
from taca_jax.evaluation.shapes.sampler import PICTURES, Sampler
from taca_jax.formats.atomic import whole_file
from taca_jax.parallel.processes import is_first
from taca_jax.pipelines.checks import check_evaluation
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.generate import load_pipeline, local_mesh
from taca_jax.pipelines.loras import used_loras
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.storage.places import Place
from taca_jax.taca import TacaConfig


def evaluate_shapes(
    pipeline: Pipeline,
    evaluate: EvalConfig,
    run_dir: Place,
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
        _report(pipeline, alignments, which, grid, run_dir)
    return best_guidance(alignments, which)


def evaluate_command(config: ShapesConfig) -> None:
    """Measures as configured, and writes all results into `config.out`.

    That folder then contains evaluation.json, evaluation.png and in pictures/ all that was drawn,
    from which an interrupted evaluation goes on. Raises UserError for problems that the user can
    fix, and if the folder holds an evaluation of something else.
    """
    out, files = Path(config.out), model_files(config)
    check_base(config)
    check_evaluation(config)
    check_record(out, config, files)
    pipeline = load_pipeline(config, local_mesh(config))
    write_record(out, config, files)
    loras = used_loras(config)
    which = variants(
        config.taca, lora=bool(loras), guidances=config.guidances or (config.guidance,)
    )
    sampler = Sampler(
        pipeline,
        config.batch_size,
        config.steps,
        config.height,
        config.width,
        config.seed,
        kept=out / PICTURES,
        lora=digest_of_loras(loras) if loras else None,
    )
    alignments, grid = measure(sampler, which, make_halves(config.prompts, config.num_images))
    _report(pipeline, alignments, which, grid, out)
    if config.num_images > 1:
        for alignment in alignments:
            _print(best_prompts(alignment, config.num_images, config.seed))


def _report(
    pipeline: Pipeline,
    alignments: Sequence[Alignment],
    which: Sequence[Variant],
    grid: Image.Image,
    folder: Place,
) -> None:
    """Prints a table of each half, and writes both, and the grid, as evaluation.json and .png."""
    own = pipeline.settings.guidance
    at = {v.name: own if v.guidance is None else v.guidance for v in which}
    halves = {each.half.name: summary(each, at) for each in alignments}
    with whole_file(folder / "evaluation.json") as file:
        file.write_text(json.dumps(halves, indent=1) + "\n")
    with whole_file(folder / "evaluation.png") as file:
        grid.save(file, format="PNG")
    for name, rows in halves.items():
        _print(table(name, rows))
    print(f"wrote {folder / 'evaluation.json'} and {folder / 'evaluation.png'}")
    if len(set(at.values())) > 1:
        best = best_guidance(alignments, which)
        print(f"best on seen compositions: guidance {best:g}; the model's own is {own:g}")


def _print(what: object) -> None:
    Console().print(what)
