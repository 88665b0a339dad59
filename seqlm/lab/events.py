"""The figures of a training in the event files of TensorBoard."""

from typing import Any, Self

from seqlm.errors import InputError
from seqlm.store.runs import EVENTS
from seqlm.training.launch import Training
from seqlm.training.loop import Report

FLUSH_EVERY = 5  # seconds


class Events:
    """Writes the figures of metrics.jsonl into the folder tensorboard/ of the run.

    A resumed training continues the curves: TensorBoard drops what a killed one wrote about later
    steps.
    """

    def __init__(self, setup: Training):
        self._folder = setup.run / EVENTS
        self._resumed = None if setup.resumed is None else setup.resumed.step
        self._writer: Any = None

    def write(self, report: Report) -> None:
        if self._writer is None:  # not earlier: an old run, which this one replaces, has gone now
            self._writer = self._opened()
        for name, value in report.metrics().items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, report.step)

    def _opened(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if self._folder.is_symlink():
            raise InputError(f"{self._folder} is a link, which seqlm never makes. Remove it.")
        purge = None if self._resumed is None else self._resumed + 1
        return SummaryWriter(str(self._folder), purge_step=purge, flush_secs=FLUSH_EVERY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
