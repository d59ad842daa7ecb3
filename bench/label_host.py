"""What labeling costs the host when the model costs nothing: `python -m bench.label_host`.

A GPU is only busy while the host gives it work in time. Here the decode loop and the graphs of its steps run
with a stand-in for the device: a forward that returns at once, and rows that end by chance. What is left is
the host's own time, and what it would have asked of the device: rows a step, steps that a captured graph
serves, copies of caches. Runs anywhere, says nothing about a GPU's own speed.

With `--gpu-ms` the stand-in has a clock: a step is done so long after it was given, one after the other, and
who looks at its tokens waits. Rows are scored meanwhile (`--scoring`). Then it says for how much of the time
such a GPU would have work.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from transformers import AutoTokenizer

from bench import _record
from pmpd import demo, gpu
from pmpd.decode.graph_steps import GraphSteps
from pmpd.decode.llama_cuda import NARROW, tile_rows
from pmpd.decode.loop import DecodeLoop
from pmpd.decode.pulse import Pulse
from pmpd.decode.requests import Completion
from pmpd.decode.slots import NEVER, SlotCache
from pmpd.labeling.config import LabelConfig
from pmpd.labeling.label import LabelPlan, in_order, submitted
from pmpd.labeling.row_threads import RowThreads
from pmpd.labeling.scoring import RowScorer, Score, decode_text
from pmpd.labeling.scoring_process import ScoringProcess
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
    gpu_ms: float | None = None
    """Milliseconds of a step on the device."""
    launch_ms: float = 0.3
    """With `gpu_ms`: what giving a captured step to the device takes, without the interpreter."""
    prefill_ms: float = 7.0
    """With `gpu_ms`: what giving a prefill to the device takes: 1,390 operations of transformers' modules for
    30 layers, however many prompts."""
    prefill_gpu_ms: float = 5.0
    """With `gpu_ms`: what a prefill takes on the device, if it is given in time."""
    host_times: float | None = None
    """With `gpu_ms`: a host that takes so many times the CPU time of this one, by a clock of CPU time, which
    others on this machine do not move. `launch_ms` and `prefill_ms` stay as they are; rows are not scored."""
    scoring: Literal["process", "thread", "none"] = "process"
    """With `gpu_ms`: where rows are scored."""
    out: Path = _record.RESULTS


class NoCache(SlotCache):
    """Counts what a cache would copy."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots, 0)
        self.copies = 0

    def copy_slots(self, *_: Any) -> None:
        self.copies += 1

    def clear_tokens(self, *_: Any) -> None:
        pass

    def token_features(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(slots), 4), torch.zeros(len(slots), 4)


class Nothing:
    """A forward that returns at once: an end token by chance."""

    def __init__(self, mean_tokens: float, tiles: bool) -> None:
        self.tiled = (4, 3, 2) if tiles else ()
        self.draw = np.random.default_rng(0)
        self.chance = 1 / mean_tokens

    def tile_rows(self, rows: int) -> int:
        return tile_rows(rows, NARROW)

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
    prefill_tokens: int = 16384
    vocabulary: int = VOCABULARY
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.state, self.pulse, self.cache = PrecisionState(), Pulse(), NoCache(self.slots)
        self.told = torch.zeros(self.slots + 1, self.max_length + 2, dtype=torch.int64)
        self.tokens, self.bad = self.told[:, :-1], self.told[:, -1]
        self.bad[:] = NEVER
        self.given: Callable[[], None] = lambda: None
        self.prefills = 0
        self.steps = CountedSteps(Nothing(self.mean_tokens, self.tiles))  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, places: Any, keep: Tensor | None) -> Tensor:
        self.given()
        self.prefills += 1
        return self.steps.forward(input_ids if keep is None else keep)  # type: ignore[call-arg]


class CountedSteps(GraphSteps):
    """The graphs of the steps, with a device that costs nothing; its time is left out."""

    def __init__(self, forward: Any) -> None:
        super().__init__(forward)
        self.device_seconds, self.graphs_made, self.replays, self.copies = 0.0, 0, 0, 0
        self.rows: list[int] = []
        self.segments: Counter[int] = Counter()

    def run(self, engine: Any, at: np.ndarray, step: Any, position: Any, count: int, *rest: Any) -> Any:
        self.rows += [len(at)] * count
        self.segments[len(engine.state.segments)] += count
        self.copies += 1
        return super().run(engine, at, step, position, count, *rest)

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


@dataclass
class Clock:
    """When a device that takes `step` seconds a step has done what it was given."""

    step: float
    launch: float
    prefill: float
    """Of the host."""
    prefill_step: float
    host_times: float | None
    busy: float = 0.0
    done: float = 0.0
    slept: float = 0.0
    stand_in: Callable[[], float] = float
    """Seconds of CPU time that were no host's."""

    def now(self) -> float:
        if self.host_times is None:
            return time.perf_counter()
        return self.host_times * (time.thread_time() - self.stand_in()) + self.slept

    def sleep(self, seconds: float) -> None:
        if self.host_times is None:
            time.sleep(seconds)
        self.slept += seconds

    def capture(self, plain: Any) -> Any:
        """`plain` as it is, with replays that take the device's time."""

        def capture(step: Any, prepare: Any = None) -> Any:
            replay = plain(step, prepare)

            def timed() -> None:
                replay()
                self.sleep(self.launch)
                self.done = max(self.done, self.now()) + self.step
                self.busy += self.step

            return timed

        return capture

    def given_prefill(self) -> None:
        """The device begins with the first of its operations and ends with the last, at the earliest."""
        begin = max(self.done, self.now())
        self.sleep(self.prefill)
        self.done = max(begin + self.prefill_step, self.now())
        self.busy += self.prefill_step

    def to_host(self, values: Tensor) -> Any:
        done = self.done

        def arrived() -> np.ndarray:
            self.sleep(max(0.0, done - self.now()))
            return values.numpy()

        return arrived


@dataclass
class Texts:
    """Real text in place of what the stand-in decodes, scored as labeling scores it."""

    plan: LabelPlan
    scoring: str

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(demo.DENSE)
        texts = Path(__file__).parents[1].glob("docs/**/*.md")
        self.tokens = self.tokenizer("".join(path.read_text() for path in texts))["input_ids"]
        self.draw = np.random.default_rng(0)
        scorer = RowScorer(self.tokenizer, frozenset({END}), self.plan.config)
        self.score: Score = ScoringProcess(scorer) if self.scoring == "process" else scorer
        nothing = Completion("", [WORD], [], (), "length")
        self.call("", {name: nothing for name in self.names()})()  # the process has started by now

    def names(self) -> list[str]:
        """Of a prompt's trajectories."""
        forks = list(self.plan.request("", [WORD]).forks)
        for fork in forks:
            forks += fork.forks
        return ["high0", *(fork.key.partition("/")[2] for fork in forks)]

    def some(self, count: int) -> list[int]:
        begin = int(self.draw.integers(0, len(self.tokens) - count))
        return self.tokens[begin : begin + count]

    def call(self, key: str, trajectories: dict[str, Completion]) -> Callable[[], dict[str, Any]]:
        if self.scoring == "none":
            return dict
        row = {"prompt_id": key, "input_ids": [WORD], "prompt_text": "x"}
        ids = self.some(self.plan.config.max_new_tokens)
        reference = {"reference_ids": ids, "reference_text": decode_text(self.tokenizer, ids)}
        return partial(self.score, row, reference, self.plan.pairs_of(trajectories))

    def rows(self, completions: Iterable[Completion]) -> Iterator[dict[str, Any]]:
        """One a prompt, made beside the decoding."""

        def calls() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
            open_rows: dict[str, dict[str, Completion]] = {}
            for completion in completions:
                key, _, name = completion.key.partition("/")
                trajectories = open_rows.setdefault(key, {})
                trajectories[name] = replace(
                    completion, tokens=self.some(len(completion.tokens)), features=None
                )
                if len(trajectories) == self.plan.trajectories:
                    yield key, self.call(key, open_rows.pop(key))

        return in_order(row for _, row in submitted(RowThreads(1), calls()))


def measure_clock(config: Config, slots: int) -> dict[str, Any]:
    """As `measure`, by the clock of a device."""
    assert config.gpu_ms is not None
    times = config.gpu_ms, config.launch_ms, config.prefill_ms, config.prefill_gpu_ms
    step, launch, prefill, prefill_step = (ms / 1e3 for ms in times)
    clock = Clock(step, launch, prefill, prefill_step, config.host_times)
    loop, plan, device = prepare(config, slots)
    clock.stand_in = lambda: device.steps.device_seconds
    scoring: Literal["process", "thread", "none"] = "none" if config.host_times else config.scoring
    texts = Texts(plan, scoring)
    gpu.capture = clock.capture(device.steps.capture)
    gpu.to_host, device.given = clock.to_host, clock.given_prefill
    completions = (event for event in loop.events() if isinstance(event, Completion))
    begin = clock.now()
    done = sum(1 for _ in texts.rows(completions))
    seconds = clock.now() - begin
    assert done == config.prompts
    count = len(device.steps.rows)
    return {
        "slots": slots,
        "scoring": scoring,
        "host_times": config.host_times,
        "gpu_ms": config.gpu_ms,
        "steps": count,
        "prefills": device.prefills,
        "ms_a_step": 1e3 * seconds / count,
        "prompts_per_second": done / seconds,
        "gpu_has_work_percent": 100 * clock.busy / seconds,
    }


def prepare(config: Config, slots: int) -> tuple[DecodeLoop, LabelPlan, FreeDevice]:
    labeling = LabelConfig(max_new_tokens=config.max_new_tokens, slots=slots)
    plan = LabelPlan(labeling)
    length = config.prompt_tokens + config.max_new_tokens
    device = FreeDevice(slots, length, config.mean_tokens, config.tiles)
    requests = [plan.request(str(i), [WORD] * config.prompt_tokens) for i in range(config.prompts)]
    first = labeling.precisions[0]
    loop = DecodeLoop(device, requests, plan.scheduler, first, {END}, stream=False)  # type: ignore[arg-type]
    return loop, plan, device


def measure(config: Config, slots: int) -> dict[str, Any]:
    loop, plan, device = prepare(config, slots)
    gpu.capture = device.steps.capture  # type: ignore[assignment]
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
        "steps_that_are_told_their_rows_percent": 100 * steps.copies / count,
        "steps_by_segments": dict(sorted(steps.segments.items())),
        "copies_of_caches": device.cache.copies,
    }


def main(config: Config) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # the stand-in for the device is not to wait for others
    results = []
    for slots in config.slots:
        results.append(measure(config, slots) if config.gpu_ms is None else measure_clock(config, slots))
        print(
            "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in results[-1].items())
        )
    settings = {"prompts": config.prompts, "mean_tokens": config.mean_tokens, "tiles": config.tiles}
    print(_record.write("label_host_cpu", {**settings, "rows": results}, "cpu", config.out))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
