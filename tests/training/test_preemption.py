"""Being told to stop: what is noted, what is raised, and what is left as it was."""

import os
import signal
import time

import pytest

from taca_jax.errors import StoppedError
from taca_jax.training.preemption import Notice


def tell(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # Python hands signals on between instructions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    def told_in_a_step() -> None:
        with Notice("go on so") as notice, notice.steps():
            assert not notice.reached()
            tell(number)
            assert notice.reached()
            raise notice.stopped("as planned")

    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match="as planned; go on so"):
        told_in_a_step()
    assert signal.getsignal(number) == before


def test_outside_of_steps_sigterm_stops_at_once():
    def told_before_steps() -> None:
        with Notice("go on so"):
            tell(signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(StoppedError, match="saved; go on so"):
        told_before_steps()


def test_told_after_the_last_step():
    def told_at_the_end() -> None:
        with Notice("") as notice, notice.steps():
            assert not notice.reached()
            tell(signal.SIGTERM)

    with pytest.raises(StoppedError, match="all steps"):
        told_at_the_end()


def test_the_second_ctrl_c_stops_at_once(capsys):
    def interrupted_twice() -> None:
        with Notice("") as notice, notice.steps():
            for _ in range(2):
                tell(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
