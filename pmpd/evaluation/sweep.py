"""The runs of a sweep: which schedulers, at which precisions, with which options."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pmpd.errors import UserError
from pmpd.evaluation.sampling_plan import GREEDY_PLAN, SamplingPlan
from pmpd.schedulers.base import Scheduler, SchedulerEntry, find, names
from pmpd.schedulers.chain import check_chain
from pmpd.weights.base import head_dim, kv_heads

BASELINES = ("fp", "uniform")
"""What a sweep runs besides schedulers: the unquantized model, and each precision alone."""

DEFAULT_SWEEP = (*BASELINES, "static", "confidence", "random", "kv_cache")


@dataclass(frozen=True)
class Run:
    """One scheduler setting: which scheduler, at which precisions, with which options."""

    name: str
    kind: str
    """`fp`, `uniform`, `uniform_prefill` (another precision for the prefill) or a scheduler's registered
    name."""
    precisions: tuple[int, ...]
    """The chain; a single precision for uniform runs and the unquantized model."""
    prefill_bit: int
    max_new_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    entry: SchedulerEntry | None = None
    """Of a scheduler: travels with the run, so that a worker needs no registry of its own."""
    sampling: SamplingPlan = GREEDY_PLAN

    def scheduler(self) -> Scheduler | None:
        """None: every forward at `prefill_bit`. ValueError for bad options."""
        if self.kind == "uniform_prefill":
            chain = (self.prefill_bit, *self.precisions)
            return Scheduler.get_scheduler("static", precisions=chain, high_bit_steps=0)
        if self.entry is None:
            return None
        return self.entry.build(self.kind, {"precisions": self.precisions, **self.options})

    def describe(self) -> str:
        """JSON of all that defines the run's rows; paths are not part of it."""
        scheduler = None if self.kind == "uniform_prefill" else self.scheduler()
        settings = (
            scheduler.describe() if scheduler else {"name": "uniform", "precisions": list(self.precisions)}
        )
        sampling = self.sampling.describe()
        return json.dumps(
            {**settings, "prefill_bit": self.prefill_bit, "max_new_tokens": self.max_new_tokens}
            | ({"sampling": sampling} if sampling else {})
        )


@dataclass(frozen=True)
class SweepConfig:
    """A sweep of runs over one model."""

    schedulers: tuple[str, ...] = DEFAULT_SWEEP
    precisions: tuple[int, ...] = (4, 3, 2)
    max_new_tokens: int = 256
    prefill_bit: int | None = None
    """Default: the highest of the chain. Uniform runs prefill at their own precision, and once more at this
    one, so that what a schedule gains is told apart from what its prefill gains."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Scheduler -> options of each of its runs, over those that its entry's `settings` give."""
    high_bit_steps: tuple[tuple[int, ...], ...] = ()
    """Static settings, each one number of steps per pair (or one number), in place of the entry's."""
    sampling: SamplingPlan = GREEDY_PLAN
    searched: bool = False
    """Whether `high_bit_steps` is a static search's choice. The run's name says so, since the plan may be one
    of the default's too."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 4:
            raise UserError(
                f"--max-new-tokens {self.max_new_tokens}: four at least, so that the switch classes differ"
            )
        known = [*BASELINES, *names()]
        unknown = [name for name in self.schedulers if name not in known]
        if unknown or not self.schedulers:
            raise UserError(f"--schedulers {','.join(self.schedulers)}: known are {', '.join(known)}")
        for name in self.options:
            find(name)
        check_chain(self.precisions)


def sweep_runs(config: SweepConfig) -> list[Run]:
    """The runs of a sweep, in the order given; one asked for twice is one. ValueError for bad options, and
    where two different settings would have one name."""
    runs: dict[str, Run] = {}
    for kind in config.schedulers:
        for made in _runs_of(kind, config):
            run = replace(made, sampling=config.sampling)
            settings = run.describe()  # bad options are an error now, not in a worker
            other = runs.setdefault(run.name, run)
            if other is not run and (other.kind, other.describe()) != (run.kind, settings):
                raise UserError(
                    f"--schedulers: two runs are called {run.name!r}, of {other.kind} {dict(other.options)} "
                    f"and of {run.kind} {dict(run.options)}; give the entry of the scheduler a run_name that "
                    f"tells them apart"
                )
    return list(runs.values())


def check_fit(runs: Iterable[Run], config: Any, fingerprint: str | None) -> None:
    """ValueError, with the reason, where a run's scheduler was made for another model than that with this
    transformers config and fingerprint. Needs no weights: a driver asks before any worker starts."""
    for run in runs:
        scheduler = run.scheduler()
        if scheduler is not None:
            scheduler.check_model(fingerprint, head_dim(config), kv_heads(config))


def _runs_of(kind: str, config: SweepConfig) -> Iterator[Run]:
    chain, length = check_chain(config.precisions), config.max_new_tokens
    prefill = config.prefill_bit if config.prefill_bit is not None else chain[0]
    if kind == "fp":
        yield Run("fp", "fp", (16,), 16, length)
        return
    if kind == "uniform":
        for bits in chain:
            yield Run(f"uniform-{bits}", "uniform", (bits,), bits, length)
        for bits in chain:
            if bits < prefill:
                yield Run(f"uniform-{bits}-prefill-{prefill}", "uniform_prefill", (bits,), prefill, length)
        return
    name, entry = find(kind)
    given: dict[str, Any] = {}
    for other, options in config.options.items():
        if find(other)[0] == name:
            given |= options
    settings: Iterable[Mapping[str, Any]] = entry.settings(chain, length)
    if name == "static" and config.high_bit_steps:
        settings = [{"high_bit_steps": plan[0] if len(plan) == 1 else plan} for plan in config.high_bit_steps]
    for setting in settings:
        run_options = {**setting, **given}
        scheduler = entry.build(name, {"precisions": chain, **run_options})
        run_name = entry.name_run(name, scheduler, run_options)
        if name == "static" and config.searched:
            run_name = run_name.replace("static-", "static-best-", 1)
        yield Run(run_name, name, chain, prefill, length, run_options, entry)


def grid_plans(pairs: int, max_new_tokens: int, points: int) -> list[tuple[int, ...]]:
    """`points` evenly spread steps per pair in 0..m, all rising combinations: the grid of the static
    search."""
    if points < 2:
        raise UserError(f"--search-points {points}: two at least (never and always)")
    m = max_new_tokens - 1
    steps = dict.fromkeys(round(index * m / (points - 1)) for index in range(points))
    return list(itertools.combinations_with_replacement(steps, pairs))
