"""Compiled programs are kept and found by the next process; a run does not depend on it."""

import json
import os
import re
from pathlib import Path

import jax
import pytest

from taca_jax.telling import compiled
from tests.processes import last_line, run_python

PROGRAMS = ("the training step", "the sampling loop", "the text encoders")
SCRIPT = "tests/telling/one_start.py"


def environment(**values) -> dict[str, str | None]:
    """With the cache where commands have it, and Python's search path for the script."""
    return {"JAX_COMPILATION_CACHE_DIR": None, "PYTHONPATH": os.getcwd(), **values}


@pytest.fixture
def settings():
    """JAX's settings, as they were before the test."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)
    compiled._unsaid.clear()


def test_a_second_process_takes_its_programs_from_the_first_ones_folder(tmp_path):
    starts = [
        run_python(
            SCRIPT,
            str(tmp_path / f"run{i}"),
            environment=environment(
                XDG_CACHE_HOME=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
            ),
        )
        for i in range(2)
    ]
    first, second = starts
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    for program in PROGRAMS:
        assert re.search(rf"^compiled {program} in \d+ s$", first.stderr, re.M)
        said = rf"^{program} came from the compilation cache in \d+ s$"
        assert re.search(said, second.stderr, re.M)
    assert "compiled the" not in second.stderr
    assert last_line(second) == last_line(first)  # the same picture
    metrics = [json.loads((tmp_path / f"run{i}" / "metrics.jsonl").read_text()) for i in range(2)]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-6)
    assert list((tmp_path / "taca_jax" / "compiled").rglob("jit_train_step-*-cache"))


def test_a_folder_that_cannot_be_written_is_said_and_no_error(settings, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    settings.update("jax_compilation_cache_dir", str(file / "folder"))
    compiled.keep_programs()
    assert settings.jax_compilation_cache_dir is None
    teller = compiled._Teller()
    for event in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile"):
        teller.duration(f"/jax/core/compile/{event}_duration", 2.0, fun_name="jit(train_step)")
    said = capsys.readouterr().err.replace("\n  ", " ").splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"compiled programs are not kept: {file / 'folder'}: Not a directory")
    assert said[1] == "compiled the training step in 6 s"


def test_jaxs_own_settings_hold(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    compiled.keep_programs()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "mine")
    for off in ({"jax_compilation_cache_dir": "none"}, {"jax_enable_compilation_cache": False}):
        settings.update("jax_compilation_cache_dir", None)
        for name, value in off.items():
            settings.update(name, value)
        for _ in range(2):  # commands of one process, as in a notebook
            compiled.keep_programs()
        assert settings.jax_compilation_cache_dir is None
    assert not (tmp_path / "taca_jax").exists()


def test_our_folder_is_bounded_and_rid_of_what_a_kill_left(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings.update("jax_compilation_cache_dir", None)
    folder = compiled.default_folder()
    assert folder.parent == tmp_path / "taca_jax" / "compiled"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        Path(folder, name).touch()
    compiled.keep_programs()
    assert settings.jax_compilation_cache_dir == str(folder)
    assert settings.jax_compilation_cache_max_size == compiled.MOST_BYTES
    kept = {file.name for file in folder.iterdir()} - {".lockfile"}
    assert kept == {"whole-cache", "whole-atime"}


def test_a_program_that_compiles_for_long_is_said_before_it_is_done(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(compiled, "_say", said.append)
    monkeypatch.setattr(compiled, "ANNOUNCED_AFTER_SECONDS", 0.0)
    teller = compiled._Teller()
    teller.duration("/jax/core/compile/jaxpr_trace_duration", 1.0, fun_name="_denoise")
    teller.duration("/jax/core/compile/jaxpr_to_mlir_module_duration", 2.0, fun_name="_denoise")
    teller._timers["_denoise"].join()
    teller.event("/jax/compilation_cache/cache_hits")
    teller.duration("/jax/core/compile/backend_compile_duration", 0.5, fun_name="jit(_denoise)")
    teller.duration("/jax/core/compile/backend_compile_duration", 9.0, fun_name="jit(other)")
    assert said == [
        "compiling the sampling loop ...",
        "the sampling loop came from the compilation cache in 4 s",
    ]
