"""Trajectories as the published code decodes them for its labels, where they differ from ours.

- A branch that forks after decode forward s runs forward s + 1 at the high precision too, so class 0 has
one high forward. - Every pair is prefilled at its own high precision, the pair (3, 2) at 3. - A branch goes
on past its own end of sequence; its text is cut where the high trajectory ended. - A class whose fork lies
behind the end of the high trajectory is no candidate.

So a published label can be reproduced; `docs/guides/published-differences.md` says why ours differ.

Legend: m = max_new_tokens - 1 decode forwards; s_k = the high forwards of class k before its fork.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pmpd.decode.requests import Fork, Request
from pmpd.schedulers.chain import class_steps


def request(key: str, input_ids: Sequence[int], max_new_tokens: int, want_features: bool) -> Request:
    """High trajectory and branches 0..2 of one pair, to be decoded with no end of sequence at all. Keys:
    `key`/3 and `key`/0 to `key`/2."""
    forks = tuple(
        Fork(f"{key}/{k}", step, (step + 1,)) for k, step in enumerate(class_steps(max_new_tokens)[:-1])
    )
    never = (max_new_tokens - 1,)
    return Request(
        f"{key}/3", input_ids, max_new_tokens, switch_steps=never, want_features=want_features, forks=forks
    )


def cut_at_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """New tokens up to the first that ends a sequence, that one included."""
    for index, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: index + 1])
    return list(tokens)


def candidates(
    high: Sequence[int], branches: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int] | None]:
    """The tokens of branches 0..2 that are scored, None where there is no candidate.

    `high`: the high trajectory up to its end, n tokens that took n - 1 decode forwards. `branches`: all their
    tokens.
    """
    forwards = len(high) - 1
    return [
        None if forwards < step else list(branch[: len(high)])
        for step, branch in zip(class_steps(max_new_tokens)[:-1], branches, strict=True)
    ]
