"""How many workers a cluster holds, what one asks of a node, and whether more nodes can come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from pmpd.errors import UserError
from pmpd.farm import ray_private
from pmpd.farm.options import FarmOptions


def live_nodes() -> dict[str, dict[str, float]]:
    """Node id -> total resources, of every node that is alive."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def autoscaler_present() -> bool:
    """Whether something can add nodes to this cluster."""
    bootstrapped = Path("~/ray_bootstrap_config.yaml").expanduser()  # `ray up` writes it on the head
    if ray_private.cluster_config() is not None or bootstrapped.exists():
        return True
    return bool(node_types_in(ray_private.autoscaler_status()))


def node_types_in(status: Mapping[str, Any]) -> list[str]:
    """Names of the node types in an autoscaler's status; those of a cluster without one are not counted."""
    report = status.get("autoscaler_report") or {}
    types = {
        name for kind in ("active_nodes", "idle_nodes", "pending_launches") for name in report.get(kind) or {}
    }
    types |= set((report.get("node_type_mapping") or {}).values())
    return sorted(name for name in types if not name.startswith("node_"))


@dataclass(frozen=True)
class Demand:
    """What one worker asks of a node."""

    cpus: float
    gpus: float

    def fits(self, node: Mapping[str, float]) -> bool:
        return node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus

    def __str__(self) -> str:
        return " and ".join(
            f"{amount:g} {kind}" for kind, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount
        )


@dataclass(frozen=True)
class Staffing:
    """How many workers a run wants, what one asks for, and workers per node (CPU workers share its cores)."""

    workers: int
    demand: Demand
    per_node: int


def staff(options: FarmOptions, nodes: Sequence[Mapping[str, float]]) -> Staffing:
    """Fits workers to the total resources of the nodes."""
    gpu_nodes = [node for node in nodes if node.get("GPU", 0) > 0]
    gpus = options.gpus_per_worker if options.gpus_per_worker is not None else float(bool(gpu_nodes))
    if gpus:
        # A GPU is the scarce thing: CPUs are not asked for, so that a node's last core, held by someone else,
        # never idles its GPU.
        fitting = sum(int(node.get("GPU", 0) / gpus + 1e-9) for node in gpu_nodes)
        return Staffing(options.num_workers or max(1, fitting), Demand(0, gpus), 1)
    cpu_nodes = [node["CPU"] for node in nodes if node.get("CPU", 0) > 0] or [1.0]
    wanted = options.num_workers or sum(max(1, int(cpus) // 2) for cpus in cpu_nodes)
    per_node = -(-wanted // len(cpu_nodes))
    cpus = max(0.01, int(100 * min(1.0, min(cpu_nodes) / per_node)) / 100)
    return Staffing(wanted, Demand(cpus, 0), per_node)


def check_capacity(options: FarmOptions, say: Callable[[str], None]) -> None:
    """UserError, within `capacity_seconds`, if no node can ever hold a worker and nothing can add one."""
    deadline = time.monotonic() + options.capacity_seconds
    while True:
        nodes = list(live_nodes().values())
        demand = staff(options, nodes).demand
        if any(demand.fits(node) for node in nodes):
            return
        if autoscaler_present():
            say(f"no node can hold a worker ({demand}) yet; waiting for the autoscaler to bring one")
            return
        if time.monotonic() > deadline:
            has = (
                "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
                or "no node"
            )
            raise UserError(
                f"a worker asks for {demand} on one node, the cluster has: {has}; change gpus_per_worker, "
                f"add a node that has it, or use a cluster with an autoscaler"
            )
        time.sleep(0.5)
