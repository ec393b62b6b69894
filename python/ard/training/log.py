"""The log of a run: JSONL, one line per interval with the means since the line before, and TensorBoard."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ard.storage.files import write_text

LOG_NAME = "log.jsonl"
# Of the last step of an interval; every other scalar is averaged over the interval.
LAST = ("learning_rate", "grad_norm")


class RunLog:
    """Lines so far, those of before a resumption included; written to <folder>/log.jsonl if there is a folder.

    step: updates already done; later lines, of steps that will be run again, are dropped from the file.
    pending: what `pending` gave at that step.
    """

    def __init__(
        self,
        folder: Path | None,
        step: int = 0,
        pending: Mapping[str, Any] | None = None,
        *,
        tensorboard: bool = False,
    ):
        self.lines: list[dict[str, Any]] = []
        pending = pending or {"scalars": {}, "extra": {}}
        self._pending: dict[str, list[float]] = {name: list(values) for name, values in pending["scalars"].items()}
        self._extra: dict[str, float] = dict(pending["extra"])
        self._step, self._file, self._board = step, None, None
        if folder is None:
            return
        path = folder / LOG_NAME
        if path.exists():
            self.lines = [line for line in _whole_lines(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = open(path, "a")  # noqa: SIM115  (closed by `close`)
        if tensorboard:
            self._board = summary_writer_class()(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars of the step that makes ``step`` updates done."""
        self._step = step
        for name, value in scalars.items():
            values = self._pending.setdefault(name, [])
            if name in LAST:
                values.clear()
            values.append(value)

    def extra(self, scalars: dict[str, float]) -> None:
        """Scalars that stand in the next line as they are."""
        self._extra.update(scalars)

    def write(self, samples_per_second: float) -> None:
        """One line of all that was added since the last."""
        means = {name: statistics.fmean(values) for name, values in self._pending.items()}
        line = {"step": self._step, **means, **self._extra, "samples_per_second": round(samples_per_second, 2)}
        self.lines.append(line)
        self._pending.clear()
        self._extra.clear()
        if self._file:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._board:
            for name, value in line.items():
                if name != "step":
                    self._board.add_scalar(name, value, self._step)
            self._board.flush()

    def pending(self) -> dict[str, Any]:
        """What no line holds yet, for a checkpoint."""
        scalars = {name: list(values) for name, values in self._pending.items()}
        return {"scalars": scalars, "extra": dict(self._extra)}

    def close(self) -> None:
        for writer in (self._file, self._board):
            if writer:
                writer.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file; a last line that a kill has cut off is left out."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def summary_writer_class() -> type:
    """TensorBoard's writer, or an ImportError that says what to do."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"execution.tensorboard is set and {error}; pip install 'ard-kernels[train]', or "
            "execution.tensorboard=false: log.jsonl holds the same values"
        ) from error
    return SummaryWriter
