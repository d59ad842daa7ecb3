"""The precision chain, its pairs and the switch classes: what the words of a plan mean, defined once.

Legend: B rows, J pairs of the precision chain (chain length - 1).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np

from pmpd.errors import UserError

NUM_CLASSES = 4
"""Switch classes of a pair."""

FRACTIONS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Share of the decode forwards that run at the high precision, per class."""


NEVER = 2**30
"""A number of steps that no decode reaches."""


def check_chain(precisions: Sequence[int]) -> tuple[int, ...]:
    """The precision chain as a tuple; it must be distinct and descending, with two members at least."""
    try:
        chain = tuple(operator.index(bits) for bits in precisions)
    except TypeError:
        raise UserError(
            f"precisions {precisions!r}: a precision chain is a list of bit widths, e.g. [4, 3, 2]"
        ) from None
    if len(chain) < 2:
        raise UserError(
            f"precisions {list(chain)}: a precision chain needs two members at least, e.g. 4,3 or 4,3,2"
        )
    if any(low >= high for high, low in pairwise(chain)):
        raise UserError(f"precisions {list(chain)}: a precision chain is distinct and descending, e.g. 4,3,2")
    return chain


def parse_chain(text: str, flag: str = "--precisions") -> tuple[int, ...]:
    """The precision chain of a flag like `4,3,2`."""
    try:
        chain = [int(bits) for bits in text.split(",")]
    except ValueError:
        raise UserError(
            f"{flag} {text}: bit widths with commas between them, descending, e.g. 4,3,2"
        ) from None
    return check_chain(chain)


def pairs_of(chain: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(chain))


def chain_of_pairs(pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The chain whose neighbours these pairs are, one at least."""
    return pairs[0][0], *(low for _, low in pairs)


def class_steps(max_new_tokens: int) -> tuple[int, int, int, int]:
    """`high_bit_steps` of the four switch classes: (0, m//3, 2(m//3), m) with m = max_new_tokens - 1 decode
    forwards."""
    m = max_new_tokens - 1
    return 0, m // 3, 2 * (m // 3), m


SIXTHS = 6
"""Parts of the decode at whose ends the plans of `sixths_plans` switch."""


def plan_points(max_new_tokens: int) -> tuple[int, ...]:
    """Where plans switch that are labelled exactly, as `high_bit_steps`: the steps of the switch classes and
    those midway, 0 and all m = max_new_tokens - 1 decode forwards included: `SIXTHS` + 1 steps, rising."""
    steps = class_steps(max_new_tokens)
    return (*(at for low, high in pairwise(steps) for at in (low, (low + high) // 2)), steps[-1])


@cache
def sixths_plans(pairs: int) -> np.ndarray:
    """All progressive plans whose pairs switch at `plan_points`: int [P, J], the point's place 0..`SIXTHS` of
    each pair; `SIXTHS` is never. In rising order, the last one never switches."""
    return np.asarray(list(itertools.combinations_with_replacement(range(SIXTHS + 1), pairs)))


def place_of(classes: np.ndarray) -> np.ndarray:
    """Place in `sixths_plans`, int [...], of the plans that switch classes int [..., J] stand for. A pair
    never switches before the pair in front of it."""
    switches = np.maximum.accumulate(classes * (SIXTHS // (NUM_CLASSES - 1)), axis=-1)
    return (switches[..., None, :] == sixths_plans(classes.shape[-1])).all(-1).argmax(-1)


def class_plans(pairs: int, max_new_tokens: int) -> list[tuple[int, ...]]:
    """All different fixed plans of the four switch classes, cheapest first, without never switching (that is
    the uniform run).

    A pair never ends before the pair in front of it has switched, so steps that do not rise along the chain
    are another plan's double.
    """
    steps = class_steps(max_new_tokens)
    plans = itertools.combinations_with_replacement(dict.fromkeys(steps), pairs)
    return [plan for plan in plans if plan[0] < steps[-1]]


def chain_bits(chain: Sequence[int], switch_steps: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Precision of decode forward `step` (1-based, int [B]) for rows with `switch_steps` int [B, J]: int [B].

    The lowest p_{i+1} for which every h_j, j <= i, is < step; p_0 where already h_0 is not.
    """
    passed = np.logical_and.accumulate(switch_steps < step[:, None], axis=1)
    return np.asarray(chain)[passed.sum(axis=1)]
