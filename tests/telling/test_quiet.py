"""Logs are plain lines, and libtpu has nothing to say where there is no TPU."""

import os

import pytest

from taca_jax.telling import quiet
from tests.processes import run_python

LOGGING = """
import logging, warnings
from taca_jax.telling.quiet import plain_log
plain_log()
logging.getLogger("taca_jax.hub").warning("fetching a file")
logging.getLogger("absl").warning("for developers")
logging.warning("as absl does")
warnings.warn("be careful")
logging.getLogger("orbax.checkpoint").error("an error")
"""


def test_logs_and_warnings_are_plain_lines():
    done = run_python("-c", LOGGING)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "fetching a file",
        "as absl does",
        "warning: be careful",
        "an error",
    ]


@pytest.mark.parametrize("program", ["generate", "page", "train"])
def test_a_program_sets_logs_up_before_libraries_do(program):
    """Orbax logs as it is imported, for which absl gives the root logger a handler of its own."""
    script = f"""
import logging
from taca_jax.commands.{program} import main
from taca_jax.telling import command

def begin(**options):
    assert not logging.root.handlers
    raise SystemExit(7)

command.begin = begin
main(["--config", "shapes_taca", *{{"generate": ["prompt=a"]}}.get("{program}", [])])
"""
    done = run_python("-c", script)
    assert done.returncode == 7, done.stderr


@pytest.mark.skipif(quiet.has_tpu_chips(), reason="there is a TPU, or what looks like one")
def test_libtpu_is_quiet_without_a_tpu():
    pytest.importorskip("libtpu")
    program = (
        "from taca_jax.telling.command import begin; begin(); "
        "import jax; print(jax.devices()[0].platform)"
    )

    done = run_python("-c", program, environment={"JAX_PLATFORMS": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] in ("cpu", "gpu")
    assert done.stderr == ""


def test_nothing_is_changed_where_there_is_a_tpu_or_a_setting(monkeypatch):
    for name in quiet.OTHERWISE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(quiet, "has_tpu_chips", lambda: True)
    quiet.no_tpu_no_words()
    assert not quiet.OTHERWISE.keys() & os.environ.keys()
    monkeypatch.setattr(quiet, "has_tpu_chips", lambda: False)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "mine")
    quiet.no_tpu_no_words()
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "mine"
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
