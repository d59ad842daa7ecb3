"""What becomes of a unit whose worker was lost: who is to blame, its node, its rows, or nobody yet. Imports
no Ray.

A node that went is never a row's fault. A unit that ends its process twice is split into single rows; a row
is guilty when it has ended processes on two nodes, or twice where no other node can hold a worker.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from pmpd.errors import UserError
from pmpd.farm.task import Unit

KILLS_BEFORE_SPLIT = 2
KILLS_AT_MOST = 4
"""Where other nodes are there but never take the row."""

STALLS_BEFORE_BLAME = 2
NODE_LOSSES_BEFORE_SPLIT = 5
NODE_LOSSES_BEFORE_STOP = 20


def after_node_loss(unit: Unit) -> list[Unit]:
    """The unit again; after some losses its rows one by one, so that one that takes nodes along holds up no
    other. UserError where a single row has seen too many nodes go."""
    losses = unit.node_losses + 1
    if len(unit.ids) > 1 and losses >= NODE_LOSSES_BEFORE_SPLIT:
        return unit.singles()
    if losses >= NODE_LOSSES_BEFORE_STOP:
        raise UserError(
            f"row {unit.ids[0]}: {losses} nodes went while it was worked on; look at the nodes' logs. "
            f"Finished rows are kept: run the same command again, or take that row out of the input"
        )
    return [replace(unit, node_losses=losses)]


def after_kill(unit: Unit, node: str, alive: Collection[str], others: bool, told: str) -> list[Unit]:
    """`node`: where the process ended; it is alive. Kills by nodes that have gone since count no more.
    `others`: whether another node has a worker."""
    kills = (*(earlier for earlier in unit.kills if earlier in alive), node)
    unit = replace(unit, kills=kills)
    if len(unit.ids) > 1:
        return unit.singles() if len(kills) >= KILLS_BEFORE_SPLIT else [unit]
    enough = len(set(kills)) > 1 or len(kills) >= KILLS_AT_MOST
    if not others:
        enough = enough or len(kills) >= (1 if unit.split else KILLS_BEFORE_SPLIT)
    if not enough:
        return [unit]
    return [replace(unit, failed=f"WorkerDied: this row ended its worker process: {told}")]


def after_stall(unit: Unit, seconds: float) -> list[Unit]:
    """`seconds`: how long nothing moved."""
    unit = replace(unit, stalls=unit.stalls + 1)
    if unit.stalls < (1 if unit.split else STALLS_BEFORE_BLAME):
        return [unit]
    if len(unit.ids) > 1:
        return unit.singles()
    return [replace(unit, failed=f"WorkerStalled: no progress with this row for {seconds:.0f} s")]
