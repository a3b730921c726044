"""A run's metrics: a progress bar, a file of JSON lines, TensorBoard."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from taca_jax.errors import StoppedError
from taca_jax.formats.atomic import whole_file
from taca_jax.storage.places import Place
from taca_jax.storage.writing import Mirror
from taca_jax.telling.bars import SPEED_SECONDS
from taca_jax.training.wandb_log import WandbRun

PLAIN_LINE_SECONDS = 15.0
"""Without a terminal, a plain line instead of the bar, at most this often."""

UPLOAD_SECONDS = 60.0
"""A bucket has the metrics at most this late."""


class RunLog:
    """Progress and metrics of a training run; a context manager.

    Writes `metrics.jsonl` and `tensorboard/` in `run_dir`. When a run is resumed after `start`
    steps, the lines of later steps are dropped first, so that each step appears once. In a bucket,
    where nothing can be appended to, both are written again once a minute and at the end. If the
    peak FLOP/s of all devices are known, so is the share of them that the model used.
    """

    def __init__(
        self,
        run_dir: Place,
        *,
        start: int,
        steps: int,
        samples_per_step: int,
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
        wandb: WandbRun | None = None,
    ):
        """wandb: where everything is logged as well; it ends with this log."""
        self.console = Console(stderr=True)
        self._mirror = Mirror(run_dir)
        self._uploaded = time.monotonic()
        folder = self._mirror.folder
        self._jsonl = folder / "metrics.jsonl"
        self._mirror.fetch(self._jsonl.name)
        self._keep_before(start)
        self._file = self._jsonl.open("a")
        purge = start + 1 if start else 0
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self._samples_per_step = samples_per_step
        self._flops_per_step = flops_per_step
        self._peak_flops = peak_flops
        self._steps = steps
        self._wandb = wandb
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=SPEED_SECONDS,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, numbers="")
        self._start = start
        self._last = (time.perf_counter(), start)
        self._last_line = 0.0

    def __enter__(self) -> "RunLog":
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_terminal:
            self._progress.stop()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.close(failed=kind is not None and not issubclass(kind, StoppedError))
        self._mirror.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of `step`, counted from 1, and the mean time per step since the last
        call."""
        now = time.perf_counter()
        then, before = self._last
        self._last = (now, step)
        seconds = (now - then) / max(step - before, 1)
        record = {
            **metrics,
            "seconds_per_step": seconds,
            "samples_per_second": self._samples_per_step / seconds,
            **device_memory(),
        }
        if self._peak_flops is not None:
            used = self._flops_per_step / seconds
            record["model_flops_utilisation"] = used / self._peak_flops
        self._record(step, record)
        numbers = (
            f"loss {metrics['loss']:.4f}  {seconds:.3f} s/step  "
            f"{_rate(record['samples_per_second'])} samples/s"
        )
        if self._peak_flops is not None:
            numbers += f"  {record['model_flops_utilisation']:.0%} of peak"
        self._progress.update(self._task, completed=step, numbers=numbers)
        late = now - self._last_line >= PLAIN_LINE_SECONDS or step == self._steps
        if not self.console.is_terminal and late:
            self._last_line = now
            left = f"{(self._steps - step) * seconds / 60:.1f} min left"
            if before == self._start:
                left = "compiled first"
            line = f"step {step}/{self._steps}  {numbers}  {left}"
            self.console.print(line, soft_wrap=True)
        if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self._uploaded = time.monotonic()
            self._mirror.upload()

    def write_first(self, metrics: Mapping[str, float]) -> None:
        """Writes what was measured before the first step, as step 0."""
        self._record(0, metrics)

    def say(self, line: str) -> None:
        """Shows a line, above the bar if there is one."""
        self.console.print(line, soft_wrap=True, highlight=False)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context whose time is no step's: samples, validation."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            then, step = self._last
            self._last = (then + time.perf_counter() - begun, step)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """A context in which the bar says `what` in place of a step's numbers. Off a terminal, a
        line does."""
        if not self.console.is_terminal:
            self.say(f"{what} ...")
        numbers = self._progress.tasks[self._task].fields["numbers"]
        self._progress.update(self._task, numbers=what)
        try:
            yield
        finally:
            self._progress.update(self._task, numbers=numbers)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes a picture, uint8 HWC, to TensorBoard."""
        self._board.add_image(name, picture, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.image(step, name, picture)

    def _record(self, step: int, record: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, record)

    def _keep_before(self, start: int) -> None:
        if not self._jsonl.exists():
            return
        kept = []
        for line in self._jsonl.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start > 0:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # a line cut off by a kill
        with whole_file(self._jsonl) as file:
            file.write_text("".join(line + "\n" for line in kept))


def _rate(number: float) -> str:
    return f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def after(step: int) -> str:
    """When something was measured or drawn, in words."""
    return f"after step {step}" if step else "before the first step"


def device_memory() -> dict[str, float]:
    """Current and peak memory in GB, each the maximum over this process's devices.

    Empty for devices that do not report it, such as CPUs.
    """
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"device_memory_gb": "bytes_in_use", "device_memory_peak_gb": "peak_bytes_in_use"}
    return {
        name: max(stats[key] for stats in found) / 1e9
        for name, key in names.items()
        if found and all(key in stats for stats in found)
    }
