"""The runs of a sweep: which schedulers, at which precisions, with which options."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pmpd.errors import UserError
from pmpd.schedulers.base import Scheduler
from pmpd.schedulers.chain import check_chain, class_steps

SCHEDULER_KINDS = ("fp", "uniform", "static", "confidence", "random", "kv_cache")
"""What `--schedulers` takes, in the order of the default sweep. `naive` is another name of `static`."""


@dataclass(frozen=True)
class Run:
    """One scheduler setting: which scheduler, at which precisions, with which options."""

    name: str
    kind: str
    precisions: tuple[int, ...]
    """The chain; a single precision for uniform runs and the unquantized model."""
    prefill_bit: int
    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def scheduler(self) -> Scheduler | None:
        """None: every forward at `prefill_bit`. ValueError for bad options."""
        if self.kind in ("fp", "uniform"):
            return None
        return Scheduler.get_scheduler(self.kind, precisions=self.precisions, **self.options)

    def describe(self) -> str:
        """JSON of all that defines the run's rows; paths are not part of it."""
        scheduler = self.scheduler()
        settings = (
            scheduler.describe() if scheduler else {"name": "uniform", "precisions": list(self.precisions)}
        )
        return json.dumps(
            {**settings, "prefill_bit": self.prefill_bit, "max_new_tokens": self.max_new_tokens}
        )


@dataclass(frozen=True)
class SweepConfig:
    """A sweep of runs over one model."""

    schedulers: tuple[str, ...] = SCHEDULER_KINDS
    precisions: tuple[int, ...] = (4, 3, 2)
    max_new_tokens: int = 256
    prefill_bit: int | None = None
    """Default: the highest of the chain. Uniform runs prefill at their own precision."""
    high_bit_steps: tuple[tuple[int, ...], ...] = ()
    """Static settings, each one number of steps per pair (or one number). Default: all plans of the switch
    classes."""
    seed: int = 0
    random_prior: tuple[float, ...] | None = None
    confidence_threshold: float = 0.7
    confidence_patience: int = 2
    classifier_path: str | None = None
    searched: bool = False
    """Whether `high_bit_steps` is a static search's choice. The run's name says so, since the plan may be one
    of the default's too."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 4:
            raise UserError(
                f"--max-new-tokens {self.max_new_tokens}: four at least, so that the switch classes differ"
            )
        unknown = [name for name in self.schedulers if name not in (*SCHEDULER_KINDS, "naive")]
        if unknown or not self.schedulers:
            raise UserError(
                f"--schedulers {','.join(self.schedulers)}: known are {', '.join(SCHEDULER_KINDS)} (naive = "
                f"static)"
            )
        check_chain(self.precisions)


def sweep_runs(config: SweepConfig) -> list[Run]:
    """The runs of a sweep, without doubles, in the order given."""
    chain, length = check_chain(config.precisions), config.max_new_tokens
    prefill = config.prefill_bit if config.prefill_bit is not None else chain[0]
    runs: dict[str, Run] = {}
    for kind in config.schedulers:
        for run in _runs_of("static" if kind == "naive" else kind, chain, prefill, length, config):
            run.scheduler()  # bad options are an error now, not in a worker
            runs[run.name] = run
    return list(runs.values())


def _runs_of(
    kind: str, chain: tuple[int, ...], prefill: int, length: int, config: SweepConfig
) -> Iterator[Run]:
    if kind == "fp":
        yield Run("fp", "fp", (16,), 16, length)
    elif kind == "uniform":
        for bits in chain:
            yield Run(f"uniform-{bits}", "uniform", (bits,), bits, length)
    elif kind == "static":
        for steps in config.high_bit_steps or class_plans(len(chain) - 1, length):
            option = steps[0] if len(steps) == 1 and len(chain) > 2 else steps
            scheduler = Scheduler.get_scheduler("static", precisions=chain, high_bit_steps=option)
            settled = scheduler.describe()["high_bit_steps"]
            name = f"static-{'best-' * config.searched}{'/'.join(map(str, settled))}"
            yield Run(name, kind, chain, prefill, length, {"high_bit_steps": settled})
    elif kind == "random":
        options: dict[str, Any] = {"seed": config.seed} | (
            {"prior": list(config.random_prior)} if config.random_prior else {}
        )
        yield Run(f"random-{config.seed}", kind, chain, prefill, length, options)
    elif kind == "confidence":
        options = {"threshold": config.confidence_threshold, "patience": config.confidence_patience}
        yield Run(
            f"confidence-{config.confidence_threshold:g}x{config.confidence_patience}",
            kind,
            chain,
            prefill,
            length,
            options,
        )
    else:
        yield Run("kv_cache", kind, chain, prefill, length, {"save_dir": config.classifier_path})


def class_plans(pairs: int, max_new_tokens: int) -> list[tuple[int, ...]]:
    """All different fixed plans of the four switch classes, cheapest first, without never switching (that is
    the uniform run).

    A pair never ends before the pair in front of it has switched, so steps that do not rise along the chain
    are another plan's double.
    """
    steps = class_steps(max_new_tokens)
    plans = itertools.combinations_with_replacement(dict.fromkeys(steps), pairs)
    return [plan for plan in plans if plan[0] < steps[-1]]


def grid_plans(pairs: int, max_new_tokens: int, points: int) -> list[tuple[int, ...]]:
    """`points` evenly spread steps per pair in 0..m, all rising combinations: the grid of the static
    search."""
    if points < 2:
        raise UserError(f"--search-points {points}: two at least (never and always)")
    m = max_new_tokens - 1
    steps = dict.fromkeys(round(index * m / (points - 1)) for index in range(points))
    return list(itertools.combinations_with_replacement(steps, pairs))
