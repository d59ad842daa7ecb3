"""When to lower the precision: what a scheduler is, and the registry of them.

Legend: B rows, J pairs of the precision chain (chain length - 1).

A scheduler decides once for every row (`begin`, at the decision point) and may then watch the decode
(`observe`). *Progressive* schedulers speak in `switch_steps` int32 [B, J]: row b runs its decode forwards
1..h_j at the high precision of pair j, so its precision never rises. *Online* ones answer the precision of
the next forward, row by row and step by step, and may go back up.

A new scheduler is one class and one entry of `SCHEDULERS`; everything else (flags, sweeps, run names, scores,
figures, report) takes it from there.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from pmpd.errors import UserError
from pmpd.schedulers.chain import check_chain, pairs_of

STATISTICS = ("top_probability", "margin", "entropy")
"""What a scheduler may ask to know of the distribution that each new token came from: the largest
probability; the largest minus the second largest; the entropy in nats. Of the model's own logits, whatever
sampling does with them."""

PROMPT_VALUES = ("loss", "entropy", "margin", "last_entropy", "last_margin")
"""What is known of a prompt after its prefill: mean negative log likelihood of its last tokens, mean entropy
and top-1 margin behind them, and both behind the last token alone."""

UNUSED_OPTIONS = ("max_new_tokens", "dropout_prob")
"""Published options that nothing here needs: each row has its own number of new tokens, and dropout acts in
training only."""


@dataclass(frozen=True)
class PromptState:
    """What the model says of a prompt (`pmpd.decode.prompt_state`)."""

    values: Mapping[str, float]
    """`PROMPT_VALUES` -> value."""
    probes: Mapping[int, float]
    """Lower precision -> mean divergence of the same tokens from the highest precision, nats."""


def _no_prompts(precisions: Sequence[int]) -> Sequence[PromptState]:
    raise NotImplementedError("no model tells the states of these prompts")


@dataclass
class PrefillState:
    """What a scheduler may look at when it decides: the rows that have come to their decision point."""

    keys: Sequence[str]
    """Row keys (prompt ids): all randomness of a row is derived from them."""
    max_new_tokens: Sequence[int]
    prompt_lengths: Sequence[int]
    features: Callable[[], tuple[Tensor, Tensor, Tensor]]
    """KV features of the rows, computed when called: keys and values [B, T, D] float32 zero-padded on the
    right, and the valid lengths int64 [B], all on the model's device."""
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of the newest token: the `statistics` that the scheduler asks for, each float32 [B]."""
    prompts: Callable[[Sequence[int]], Sequence[PromptState]] = _no_prompts
    """The state of each row's prompt, computed when called: by one forward over its last tokens at each of
    the precisions given, of which the first is the one that is described, the others are probed. See
    `Scheduler.prompt_bits`."""


@dataclass
class Decision:
    """What `begin` answers."""

    switch_steps: np.ndarray
    """int32 [B, J]; `NEVER` where a pair does not switch by itself."""
    classes: np.ndarray | None = None
    """Switch class of each row and pair, int [B, J], for schedulers that choose one."""
    scores: np.ndarray | None = None
    """What the classes were chosen by, float32 [B, J, 4] (logits)."""
    states: Sequence[Any] | None = None
    """One object for each row, the scheduler's own; `observe` gets it back with the row."""


@dataclass
class ObservedRows:
    """The rows of one decode forward, just after it: what `observe` may look at, and change where it says
    so."""

    keys: Sequence[str]
    step: np.ndarray
    """The decode forward that each row has just run, int [B]."""
    bits: np.ndarray
    """The precision it ran at, int [B]."""
    switch_steps: np.ndarray
    """int32 [B, J]. May be lowered in place, never below `step`."""
    states: list[Any]
    """The rows' own objects, from `Decision.states`. Change them, or put others in their place."""
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of the token just produced: the `statistics` that the scheduler asks for, each float32 [B]."""


class Scheduler(ABC):
    """Decides the precision of every decode forward. Holds nothing about rows: what it must remember of one
    is in the row's state."""

    name: ClassVar[str] = ""
    statistics: tuple[str, ...] = ()
    """Those of `STATISTICS` that `begin` and `observe` want. Each costs a pass over the logits, and all of
    them a transfer to the host after every step."""
    prompt_bits: tuple[int, ...] = ()
    """The precisions that `begin` will ask `PrefillState.prompts` for, where it does: what the prefill tells
    already then takes no forward of its own."""
    decision_step: int = 0
    """The decision point: after this decode forward; 0 = after prefill. Forwards before it run at the highest
    precision of the chain."""

    def __init__(self, precisions: Sequence[int]) -> None:
        self.precisions = check_chain(precisions)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return pairs_of(self.precisions)

    @abstractmethod
    def begin(self, state: PrefillState) -> Decision:
        """The decision for rows at their decision point."""

    def observe(self, rows: ObservedRows) -> np.ndarray | None:
        """After every decode forward behind the decision point: may lower `rows.switch_steps`. An online
        scheduler answers the precisions of the next forwards instead, int [B], each one of the chain. Rows
        that follow a given plan are not observed."""
        return None

    @property
    def observes(self) -> bool:
        return type(self).observe is not Scheduler.observe

    def check_model(self, fingerprint: str | None, dim: int, num_heads: int) -> None:  # noqa: B027 - optional
        """ValueError, with the reason, where the scheduler was made for another model: `dim` head dim,
        `num_heads` KV heads."""

    def describe(self) -> dict[str, Any]:
        """Name and settings, as manifests and generations record them."""
        return {"name": type(self).name, "precisions": list(self.precisions)}

    @staticmethod
    def get_scheduler(name: str, **options: Any) -> Scheduler:
        """The published door: `Scheduler.get_scheduler('naive', precisions=[3, 2], high_bit_steps=10)`.

        Names: those of `SCHEDULERS` and their aliases (naive = static). Options that only another scheduler
        uses are accepted and ignored, so that one dictionary serves all (as published); an option that no
        scheduler knows, or that this one lacks, is a ValueError.
        """
        _, entry = find(name)
        known = {option for other in SCHEDULERS.values() for option in other.takes} | set(UNUSED_OPTIONS)
        unknown = sorted(set(options) - known)
        if unknown:
            raise UserError(f"scheduler option {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        return entry.build(name, {key: value for key, value in options.items() if key in entry.takes})


def _may_be(annotation: str, value: Any) -> bool:
    """Whether an option annotated as a number or a bool may have this value; True for other annotations."""
    kinds = {kind.strip() for kind in annotation.split("|")}
    if not kinds <= {"int", "float", "bool", "None"}:
        return True
    if isinstance(value, bool) or value is None:
        return ("None" if value is None else "bool") in kinds
    return isinstance(value, Real) and not math.isnan(value) and kinds != {"bool"}


@dataclass(frozen=True)
class SchedulerEntry:
    """What is to be known of a scheduler besides its class. Everything but `make` has a default that
    serves."""

    make: Callable[..., Scheduler]
    """The class, or a function that takes its options by name."""
    options: tuple[str, ...] = ()
    """The options it takes; default the parameters of `make`."""
    settings: Callable[[tuple[int, ...], int], Iterable[Mapping[str, Any]]] = lambda chain, length: ({},)
    """(chain, max_new_tokens) -> the options of each run that a sweep makes of it; default one run without
    any."""
    run_name: Callable[[Scheduler, Mapping[str, Any]], str] | None = None
    """(scheduler, its options) -> the name of a run in tables and figures; default the registered name, with
    the options given: `mine-x=3`."""
    aliases: tuple[str, ...] = ()
    """Other names that it answers to."""

    @property
    def takes(self) -> tuple[str, ...]:
        return self.options or tuple(inspect.signature(self.make).parameters)

    def build(self, name: str, options: Mapping[str, Any]) -> Scheduler:
        """The scheduler with these options. UserError for one that it does not take, that is missing, or that
        is no number where `make` says it is one."""
        strange = sorted(set(options) - set(self.takes))
        if strange:
            raise UserError(
                f"scheduler {name!r}, option {', '.join(strange)}: it takes {', '.join(self.takes)}"
            )
        parameters = inspect.signature(self.make).parameters.items()
        needed = [option for option, given in parameters if given.default is given.empty]
        missing = [option for option in needed if options.get(option) is None]
        if missing:
            raise UserError(
                f"scheduler {name!r} needs the option {', '.join(missing)}; it takes {', '.join(self.takes)}"
            )
        for option, given in parameters:
            if option in options and not _may_be(str(given.annotation), options[option]):
                raise UserError(
                    f"scheduler {name!r}, option {option} {options[option]!r}: give a {given.annotation}"
                )
        return self.make(**options)

    def name_run(self, name: str, scheduler: Scheduler, options: Mapping[str, Any]) -> str:
        if self.run_name is not None:
            return self.run_name(scheduler, options)
        return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


SCHEDULERS: dict[str, SchedulerEntry] = {}
"""Name -> entry. `pmpd.schedulers` puts its own in; a program may add more."""


def find(name: str) -> tuple[str, SchedulerEntry]:
    """(registered name, entry) of a name or an alias. ValueError for an unknown one, with those there are."""
    for registered, entry in SCHEDULERS.items():
        if name == registered or name in entry.aliases:
            return registered, entry
    raise UserError(f"scheduler {name!r}: known are {', '.join(sorted(names()))}")


def names() -> list[str]:
    """All names that `find` knows, aliases included."""
    return [name for registered, entry in SCHEDULERS.items() for name in (registered, *entry.aliases)]
