"""`pmpd label`, with one fault in it: `python -m bench._farm_faults MARKER label ...`.

The first worker that begins a unit of labels asks the GPU for what it does not hold, which breaks the GPU's
context of that process, and makes the file MARKER so that no other worker does it again. Without a GPU the
error is raised as CUDA would.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pmpd.cli import label as label_command
from pmpd.cli.main import main
from pmpd.farm.label_task import LabelTask
from pmpd.farm.task import BuiltTask, Item, LateRow, Place


def break_gpu() -> None:
    """RuntimeError or torch.AcceleratorError, of which the process does not recover where there is a GPU."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")[torch.tensor([10**6], device="cuda")].item()
    raise RuntimeError("CUDA error: device-side assert triggered (raised by hand: there is no GPU here)")


@dataclass(frozen=True)
class FaultyLabelTask(LabelTask):
    marker: str = ""

    def build(self, place: Place) -> BuiltTask:
        built = super().build(place)

        def run(items: list[Item]) -> Iterable[dict[str, Any] | LateRow]:
            if not Path(self.marker).exists():
                Path(self.marker).write_text(place.worker)
                break_gpu()
            return built.run(items)

        return replace(built, run=run)


if __name__ == "__main__":
    marker = sys.argv.pop(1)
    label_command.LabelTask = lambda *arguments, **named: FaultyLabelTask(  # type: ignore[assignment, misc]
        *arguments, **named, marker=marker
    )
    sys.exit(main())
