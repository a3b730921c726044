"""A run's numbers: each step once in the file, the board and, now and then, a line."""

import json

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from taca_jax.training import log as metrics
from taca_jax.training.log import RunLog


def log_steps(run_dir, first, last, *, start=None, steps=10):
    start = first - 1 if start is None else start
    with RunLog(run_dir, start=start, steps=steps, samples_per_step=8) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss": 1 / step, "gradient_norm": 2.0})


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def events(run_dir):
    """Every TensorBoard event of a run: records are (length u64, crc u32, data, crc u32)."""
    found = []
    for file in sorted((run_dir / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_a_line_a_step(tmp_path):
    log_steps(tmp_path, 1, 3)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert found[1]["loss"] == 0.5
    for line in found:
        assert line["seconds_per_step"] > 0
        assert line["samples_per_second"] == pytest.approx(8 / line["seconds_per_step"])


def test_seconds_are_per_step_where_steps_are_left_out(tmp_path, monkeypatch):
    clock = iter([100.0, 101.0, 111.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    with RunLog(tmp_path, start=0, steps=100, samples_per_step=8) as log:
        log.write(1, {"loss": 1.0})
        log.write(21, {"loss": 1.0})
    assert [line["seconds_per_step"] for line in lines(tmp_path)] == [1.0, 0.5]


def test_utilisation_is_there_where_a_peak_is_known(tmp_path, monkeypatch, capsys):
    clock = iter([100.0, 102.0, 100.0, 102.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    peak = {"flops_per_step": 8e12, "peak_flops": 1e13}
    with RunLog(tmp_path, start=0, steps=1, samples_per_step=8, **peak) as log:
        log.write(1, {"loss": 1.0})
    assert lines(tmp_path)[0]["model_flops_utilisation"] == 0.4
    assert "4.0 samples/s  40% of peak  " in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    log_steps(other, 1, 1)
    assert "model_flops_utilisation" not in lines(other)[0]


class Device:
    def __init__(self, used):
        self.used = used

    def memory_stats(self):
        return self.used and {"bytes_in_use": self.used, "peak_bytes_in_use": 3 * self.used}


def test_memory_is_the_fullest_devices_where_they_say(monkeypatch):
    assert metrics.device_memory() == {}  # on a CPU
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device(10**9), Device(2 * 10**9)])
    assert metrics.device_memory() == {"device_memory_gb": 2.0, "device_memory_peak_gb": 6.0}
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device(None)])
    assert metrics.device_memory() == {}


def test_going_on_drops_what_comes_again(tmp_path):
    log_steps(tmp_path, 1, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log_steps(tmp_path, 4, 6)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    log_steps(tmp_path, 1, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_the_board_has_scalars_pictures_and_where_a_run_went_on(tmp_path):
    log_steps(tmp_path, 1, 4)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.1"))  # files are called after the second
    with RunLog(tmp_path, start=2, steps=10, samples_per_step=8) as log:
        log.write(3, {"loss": 0.25})
        log.image(3, "samples", np.zeros((4, 6, 3), np.uint8))
    found = events(tmp_path)
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in found
        for value in event.summary.value
        if not value.HasField("image")
    }
    assert scalars[1, "loss"] == 1.0
    assert scalars[3, "loss"] == 0.25
    assert (3, "samples_per_second") in scalars
    (image,) = [v.image for e in found for v in e.summary.value if v.HasField("image")]
    assert (image.height, image.width) == (4, 6)
    # TensorBoard forgets the steps from a restart's on: 3 and 4 of the first part, not 2.
    restarts = [e.step for e in found if e.session_log.status == e.session_log.START]
    assert restarts[-1] == 3


def test_without_a_terminal_there_is_a_line_now_and_then_and_at_the_end(
    tmp_path, capsys, monkeypatch
):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    with RunLog(tmp_path, start=0, steps=100_000, samples_per_step=8) as log:
        for step in (1, 2, 3, 4, 5, 100_000):
            now[0] += 6.0
            log.write(step, {"loss": 123.456})
    err = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in err] == [
        "step 1/100000",
        "step 4/100000",
        "step 100000/100000",
    ]
    assert err[0].endswith("  loss 123.4560  6.000 s/step  1.3 samples/s  compiled first")
    assert err[1].endswith("  loss 123.4560  6.000 s/step  1.3 samples/s  9999.6 min left")


def test_a_run_that_fails_closes_its_files(tmp_path):
    class FailedError(Exception):
        pass

    def fail():
        with RunLog(tmp_path, start=0, steps=10, samples_per_step=8) as log:
            log.write(1, {"loss": 1.0})
            raise FailedError

    with pytest.raises(FailedError):
        fail()
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_the_time_left_is_there_though_a_step_takes_minutes(tmp_path, monkeypatch):
    now = [0.0]
    with RunLog(tmp_path, start=0, steps=10, samples_per_step=8) as log:
        monkeypatch.setattr(log._progress, "get_time", lambda: now[0])
        for step in (1, 2, 3):
            now[0] += 240.0
            log.write(step, {"loss": 1.0})
        (task,) = log._progress.tasks
        assert task.time_remaining == pytest.approx(7 * 240, rel=0.01)
