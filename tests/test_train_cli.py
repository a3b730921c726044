"""train.py on the command line: exit codes, one line on stderr, and no traceback."""

import sys
from pathlib import Path

import pytest

import train
from taca_jax.errors import StoppedError
from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "steps": "2",
    "data.batch_size": "2",
    "data.source": "generated:shapes/16",
    "data.weights": "",
    "model.num_heads": "2",
    "model.head_dim": "16",
    "model.axes_dim": "4,6,6",
    "model.num_double_blocks": "1",
    "model.num_single_blocks": "1",
    "model.txt_dim": "32",
    "model.pooled_dim": "32",
    "text.encoder.dim": "32",
    "text.encoder.ff_dim": "32",
    "text.encoder.num_layers": "1",
    "optimizer.kind": "adamw",
    "optimizer.warmup_steps": "0",
    "optimizer.decay_steps": "0",
    "features": "none",
    "log_every": "1",
    "sample_every": "0",
    "evaluate": "none",
}
IDENTITY = {"pixels__shift_factor": "0", "pixels__scaling_factor": "1"}


def command(**values):
    """Arguments of a tiny run with `values`; a group that is none has no members."""
    values = TINY | {name.replace("__", "."): value for name, value in values.items()}
    gone = [name + "." for name, value in values.items() if value == "none"]
    kept = {k: v for k, v in values.items() if not any(k.startswith(name) for name in gone)}
    return ["--config=shapes_base", *(f"{name}={value}" for name, value in kept.items())]


def run_here(monkeypatch, capsys, *arguments):
    """(exit status, stderr) of main() in this process, which imports nothing again."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        train.main()
    code = end.value.code
    err = capsys.readouterr().err
    # Python itself prints a message given as the code, and exits with 1.
    return (1, f"{err}{code}\n") if isinstance(code, str) else (code, err)


def run_process(*arguments):
    # Steps that are run twice are not worth optimising.
    cheaply = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    return run_python("train.py", *arguments, environment=cheaply)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "shapes_bas"], "unknown preset shapes_bas; there are shapes_base"),
        ([], "no --config NAME given; the presets are "),
        (["--config", "shapes_base", "stepz=3"], "steps"),
        (["--config", "shapes_base", "optimizer.learning_rat=3"], "optimizer.learning_rate"),
        (["--config", "shapes_base", "steps=many"], "steps=many: expected an integer"),
        (["--config", "shapes_base", "steps=0"], "steps is 0; it must be 1 or more"),
        (["--config", "shapes_base", "dtype=float16"], "expected one of float32, bfloat16"),
        (["--config", "shapes_base", "lora.rank=4"], "lora adapts a trained model"),
        (["--config", "shapes_base", "resume"], "resume: expected key=value"),
    ],
)
def test_a_wrong_command_line_exits_with_2(monkeypatch, capsys, arguments, message):
    code, err = run_here(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__source": "folder:nowhere"}, "nowhere does not exist"),
        ({"data__source": "generated:shapes/none"}, "after generated:shapes/ comes a number"),
        ({"data__resolution": "48"}, "shapes are drawn at 40 pixels"),
        ({"autoencoder": "nowhere"}, "autoencoder=nowhere says what latents are; leave out pixels"),
        ({"autoencoder": "nowhere"} | IDENTITY, "nowhere is not there; give an autoencoder"),
        ({"text__tokenizer": "nowhere"}, "is neither shapes, bytes nor a folder with a tokenizer"),
        ({"text__encoder__dim": "48"}, "text.encoder.dim is 48"),
        ({"sample_every": "1", "sample_prompts": "a dog"}, "the word 'dog' is unknown to this"),
        ({"model": "none", "base": "nowhere", "text__encoder": "none"}, "leave out text"),
    ],
)
def test_what_the_user_can_mend_exits_with_1(monkeypatch, capsys, tmp_path, values, message):
    code, err = run_here(monkeypatch, capsys, *command(**values, out_dir=str(tmp_path)))
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "config.json").exists()


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("taca_jax.training.run.train", interrupted)
    code, err = run_here(monkeypatch, capsys, *command(out_dir=str(tmp_path)))
    assert code == 1
    assert err == f"stopped; go on with resume=true out_dir={tmp_path}\n"


@pytest.mark.parametrize(("plan", "kept"), [("none", True), ("v5e-1", False)])
def test_programs_for_chips_that_are_not_here_are_not_kept(monkeypatch, tmp_path, plan, kept):
    calls = []
    monkeypatch.setattr("taca_jax.telling.command.keep_programs", lambda: calls.append("kept"))
    monkeypatch.setattr("taca_jax.training.run.train", lambda *_: calls.append("done"))
    monkeypatch.setattr("taca_jax.planning.plan.plan", lambda *_: calls.append("done"))
    train.main(command(plan=plan, out_dir=str(tmp_path)))
    assert calls == (["kept", "done"] if kept else ["done"])


def test_a_run_that_was_told_to_stop_exits_with_0(monkeypatch, capsys, tmp_path):
    def stopped(*_):
        raise StoppedError("told to stop: saved after step 3 of 6")

    monkeypatch.setattr("taca_jax.training.run.train", stopped)
    monkeypatch.setattr(sys, "argv", ["train.py", *command(out_dir=str(tmp_path))])
    train.main()
    assert capsys.readouterr().err == "told to stop: saved after step 3 of 6\n"


def test_a_run_from_the_command_line_and_what_stands_in_its_way(monkeypatch, capsys, tmp_path):
    run_dir = tmp_path / "run"
    first = run_process(*command(out_dir=run_dir))
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr
    assert "step 2/2  loss " in first.stderr
    assert f"model written to {run_dir / 'model'}" in first.stdout
    code, err = run_here(monkeypatch, capsys, *command(out_dir=run_dir))
    assert code == 1
    assert err.startswith(f"error: {run_dir} holds a run already; resume=true")
    assert err.count("\n") == 1


def test_an_unknown_key_is_one_line_of_a_process_too():
    wrong = run_process("--config", "shapes_base", "learning_rate=3")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: ")
    assert "optimizer.learning_rate" in wrong.stderr
