"""Training that waits long for its input warns, and says what is being read."""

import threading
import time

import numpy as np

from taca_jax.data import loader as loader_module
from taca_jax.data.config import DataConfig
from taca_jax.data.loader import make_loader
from taca_jax.data.wait_monitor import WaitMonitor


class Stuck:
    """Reading example 3 takes until `let_go` is set."""

    def __init__(self):
        self.let_go = threading.Event()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 3:
            self.let_go.wait(20)
        return {"image": np.zeros((2, 2, 3), np.uint8), "caption": "", "id": str(index)}


def waited(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("no data for")]


def test_a_loader_that_waits_names_the_example(caplog, monkeypatch):
    monkeypatch.setattr(loader_module, "WaitMonitor", lambda: WaitMonitor(0.2))
    source = Stuck()
    timer = threading.Timer(1.0, source.let_go.set)
    data = DataConfig(batch_size=8)
    with make_loader(source, data=data, tokenize=lambda c: np.zeros((len(c), 1))) as loader:
        timer.start()
        assert len(next(loader)["id"]) == 8
        said = waited(caplog)
        assert 1 <= len(said) <= 3  # ever more seldom
        assert "waiting for example 3 (read for " in said[0]
        next(loader)
        assert waited(caplog) == said
    timer.join()


def test_what_is_quick_is_not_reported(caplog):
    watch = WaitMonitor(0.2)
    for _ in range(5):
        with watch.waiting(), watch.reading("a"):
            time.sleep(0.1)
    watch.close()
    assert not waited(caplog)


def test_threads_that_do_not_read_are_reported_too(caplog):
    watch = WaitMonitor(0.1)
    with watch.waiting():
        time.sleep(0.3)
    watch.close()
    assert "none of which is reading" in waited(caplog)[0]
