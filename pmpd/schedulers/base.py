"""When to lower the precision. A scheduler sets, for every row, the number of high-precision steps of each
pair.

Legend: B rows, J pairs of the precision chain (chain length - 1).

The common state of all schedulers is `switch_steps` int32 [B, J]: row b runs its decode forwards 1..h_j at
the high precision of pair j. `chain_bits` turns that into the precision of decode forward t. A scheduler
either fixes the steps once, at the decision point (`begin`: after prefill, before decode forward 1), or
watches the decode and lowers later (`observe`)."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from pmpd.errors import UserError
from pmpd.schedulers.chain import check_chain, pairs_of

UNUSED_OPTIONS = ("max_new_tokens", "dropout_prob")
"""Published options that nothing here needs: each row has its own number of new tokens, and dropout acts in
training only."""

SCHEDULERS: dict[str, tuple[Callable[..., Scheduler], tuple[str, ...]]] = {}
"""Name -> (how it is made, the options it takes). `pmpd.schedulers` puts its own in; a program may add
more."""


@dataclass
class PrefillState:
    """What a scheduler may look at when it decides: the rows just prefilled."""

    keys: Sequence[str]
    """Row keys (prompt ids): all randomness of a row is derived from them."""
    max_new_tokens: Sequence[int]
    prompt_lengths: Sequence[int]
    features: Callable[[], tuple[Tensor, Tensor, Tensor]]
    """KV features of the rows, computed when called: keys and values [B, T, D] float32 zero-padded on the
    right, and the valid lengths int64 [B], all on the model's device."""
    top_probability: Tensor | None = None
    """Softmax probability of new token 1, float32 [B] (only for schedulers with `needs_probability`)."""


class Scheduler(ABC):
    """Decides the precision of every decode forward. See the module's text for the one rule all of them
    share."""

    needs_probability: ClassVar[bool] = False
    """Whether `begin` and `observe` want the probability of the token just produced (costs a softmax a
    step)."""

    def __init__(self, precisions: Sequence[int]) -> None:
        self.precisions = check_chain(precisions)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return pairs_of(self.precisions)

    @abstractmethod
    def begin(self, state: PrefillState) -> np.ndarray:
        """`switch_steps` int32 [B, J] for rows at their decision point."""

    def observe(self, switch_steps: np.ndarray, step: np.ndarray, top_probability: np.ndarray) -> None:  # noqa: B027 - optional
        """After decode forward `step` int [B]: may lower entries of `switch_steps` [B, J] in place, never
        below `step`."""

    def check_model(self, fingerprint: str | None, dim: int, num_heads: int) -> None:  # noqa: B027 - optional
        """ValueError, with the reason, where the scheduler was made for another model: `dim` head dim,
        `num_heads` KV heads."""

    def describe(self) -> dict[str, Any]:
        """Name and settings, as manifests and generations record them."""
        return {"name": type(self).name, "precisions": list(self.precisions)}

    name: ClassVar[str] = ""

    @staticmethod
    def get_scheduler(name: str, **options: Any) -> Scheduler:
        """The published door: `Scheduler.get_scheduler('naive', precisions=[3, 2], high_bit_steps=10)`.

        Names: naive (= static), kv_cache, confidence, random. Options that only another scheduler uses are
        accepted and ignored, so that one dictionary serves all (as published); an option that no scheduler
        knows, or that this one lacks, is a ValueError.
        """
        if name not in SCHEDULERS:
            raise UserError(f"scheduler {name!r}: known are {', '.join(sorted(SCHEDULERS))}")
        known = {option for _, accepted in SCHEDULERS.values() for option in accepted} | set(UNUSED_OPTIONS)
        unknown = sorted(set(options) - known)
        if unknown:
            raise UserError(f"scheduler option {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        make, accepted = SCHEDULERS[name]
        needed = [
            option
            for option, given in inspect.signature(make).parameters.items()
            if given.default is given.empty
        ]
        missing = [option for option in needed if options.get(option) is None]
        if missing:
            raise UserError(
                f"scheduler {name!r} needs the option {', '.join(missing)}; it takes {', '.join(accepted)}"
            )
        return make(**{key: value for key, value in options.items() if key in accepted})
