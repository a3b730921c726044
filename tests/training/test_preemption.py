"""Being told to stop: what is noted, and what is left as it was."""

import os
import signal
import time

import pytest

from taca_jax.training.preemption import Notice


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with Notice() as notice:
        assert not notice.reached(1)
        os.kill(os.getpid(), number)
        assert notice.reached(2)
    assert signal.getsignal(number) == before


def test_the_second_ctrl_c_stops_at_once(capsys):
    def interrupted_twice() -> None:
        with Notice():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)  # Python hands signals on between instructions

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
