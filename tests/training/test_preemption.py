"""Being told to stop: what is noted, and what is left as it was."""

import os
import signal
import time

import pytest

from taca_jax.training.signals import Notice


@pytest.fixture(autouse=True)
def usual_handlers():
    """As in a terminal, wherever the tests run."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tell(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # Python hands signals on between instructions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    notice = Notice("go on so")
    with notice.steps():
        assert not notice.reached()
        tell(number)
        assert notice.reached()
    assert signal.getsignal(number) == before
    with notice.steps():  # of the next stage
        assert notice.reached()
    assert str(notice.stopped("saved")) == "told to stop: saved; go on so"


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    notice = Notice("")
    with notice.steps():
        tell(signal.SIGINT)
        assert not notice.reached()


def test_the_second_ctrl_c_stops_at_once(capsys):
    def interrupted_twice() -> None:
        with Notice("").steps():
            for _ in range(2):
                tell(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
