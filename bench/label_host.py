"""What labeling costs the host when the model costs nothing: `python -m bench.label_host`.

A GPU is only busy while the host gives it work in time. Here the decode loop and the graphs of its steps run
with a stand-in for the device: a forward that returns at once, and rows that end by chance. What is left is
the host's own time, and what it would have asked of the device: rows a step, steps that a captured graph
serves, copies of caches. Runs anywhere, says nothing about a GPU's own speed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from bench import _record
from pmpd.decode import graph_steps
from pmpd.decode.graph_steps import GraphSteps
from pmpd.decode.loop import DecodeLoop
from pmpd.decode.pulse import Pulse
from pmpd.decode.slots import SlotCache
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.label import _LabelPlan
from pmpd.weights.base import PrecisionState

END, WORD, VOCABULARY = 1, 2, 4


@dataclass(frozen=True)
class Config:
    prompts: int = 256
    """Prompts labeled in one go: a unit of the farm."""
    prompt_tokens: int = 200
    max_new_tokens: int = 256
    mean_tokens: float = 200.0
    """Rows end at random; without a limit they would have so many new tokens."""
    slots: tuple[int, ...] = (64, 256, 512)
    tiles: bool = False
    """Steps as dequantized weights have them: rows in tiles, one graph for all mixes of precisions."""
    out: Path = _record.RESULTS


class NoCache(SlotCache):
    """Counts what a cache would copy."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots, 0)
        self.copies = 0

    def copy_slots(self, sources: Any, targets: Any, lengths: Any) -> None:
        self.copies += 1

    def mean_features(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(length, 4), torch.zeros(length, 4)


class Nothing:
    """A forward that returns at once: an end token by chance."""

    def __init__(self, mean_tokens: float, tiles: bool) -> None:
        self.tiled, self.tile_rows = ((4, 3, 2) if tiles else ()), 32
        self.draw = np.random.default_rng(0)
        self.chance = 1 / mean_tokens

    def __call__(self, input_ids: Tensor, *_: Any) -> Tensor:
        logits = np.zeros((len(input_ids), VOCABULARY), dtype=np.float32)
        ends = self.draw.random(len(input_ids)) < self.chance
        logits[np.arange(len(input_ids)), np.where(ends, END, WORD)] = 1
        return torch.from_numpy(logits)


@dataclass
class FreeDevice:
    """What the loop works with, at no cost."""

    slots: int
    max_length: int
    mean_tokens: float
    tiles: bool
    sync_every: int = 8
    vocabulary: int = VOCABULARY
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.state, self.pulse, self.cache = PrecisionState(), Pulse(), NoCache(self.slots)
        self.tokens = torch.zeros(self.slots + 1, self.max_length + 1, dtype=torch.int64)
        self.bad = torch.zeros(self.slots + 1, dtype=torch.bool)
        self.steps = CountedSteps(Nothing(self.mean_tokens, self.tiles))  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, places: Any, keep: Tensor | None) -> Tensor:
        return self.steps.forward(input_ids if keep is None else keep)  # type: ignore[call-arg]


class CountedSteps(GraphSteps):
    """The graphs of the steps, with a device that costs nothing; its time is left out."""

    def __init__(self, forward: Any) -> None:
        super().__init__(forward)
        self.device_seconds, self.graphs_made, self.replays = 0.0, 0, 0
        self.rows: list[int] = []
        self.segments: Counter[int] = Counter()

    def run(self, engine: Any, at: np.ndarray, *rest: Any) -> Any:
        self.rows.append(len(at))
        self.segments[len(engine.state.segments)] += 1
        return super().run(engine, at, *rest)

    def _step(self, buffers: Any, layout: Any) -> None:
        begin = time.thread_time()
        super()._step(buffers, layout)
        self.device_seconds += time.thread_time() - begin

    def capture(self, step: Any, prepare: Any = None) -> Any:
        self.graphs_made += 1

        def replay() -> None:
            self.replays += 1
            step()

        return replay


def measure(config: Config, slots: int) -> dict[str, Any]:
    labeling = LabelConfig(max_new_tokens=config.max_new_tokens, slots=slots)
    plan = _LabelPlan(labeling)
    length = config.prompt_tokens + config.max_new_tokens
    device = FreeDevice(slots, length, config.mean_tokens, config.tiles)
    graph_steps.gpu.capture = device.steps.capture  # type: ignore[assignment]
    requests = [plan.request(str(i), [WORD] * config.prompt_tokens) for i in range(config.prompts)]
    first = labeling.precisions[0]
    loop = DecodeLoop(device, requests, plan.scheduler, first, {END}, stream=False)  # type: ignore[arg-type]
    begin = time.thread_time()
    done = sum(1 for _ in loop.events())
    seconds = time.thread_time() - begin
    assert done == plan.trajectories * config.prompts
    steps, count = device.steps, len(device.steps.rows)
    return {
        "slots": slots,
        "steps": count,
        "host_ms_a_step": 1e3 * (seconds - steps.device_seconds) / count,
        "host_ms_a_prompt": 1e3 * (seconds - steps.device_seconds) / config.prompts,
        "rows_a_step": float(np.mean(steps.rows)),
        "steps_with_a_graph_percent": 100 * steps.replays / count,
        "graphs": steps.graphs_made,
        "steps_by_segments": dict(sorted(steps.segments.items())),
        "copies_of_caches": device.cache.copies,
    }


def main(config: Config) -> None:
    logging.disable(logging.WARNING)
    results = []
    for slots in config.slots:
        results.append(measure(config, slots))
        print(
            "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in results[-1].items())
        )
    settings = {"prompts": config.prompts, "mean_tokens": config.mean_tokens, "tiles": config.tiles}
    print(_record.write("label_host_cpu", {**settings, "rows": results}, "cpu", config.out))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
