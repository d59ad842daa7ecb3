"""A Ray cluster of several nodes on this host, one GPU (or CPU) each: `ray.cluster_utils.Cluster`, until a
signal ends it. `bench._farm_host.Head` starts it as `python -m bench._farm_nodes`."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType
from typing import Any

import ray
from ray.cluster_utils import Cluster


def stop(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", action="store_true", help="one GPU a node")
    parser.add_argument("--cpus", type=int, required=True, help="of each node")
    for name in ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--temp-dir", required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    # what a job of the head connects to: Ray turns a loopback address into this one
    common = {"node_ip_address": ray.util.get_node_ip_address(), "temp_dir": options.temp_dir}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **common, "num_cpus": 1, "num_gpus": 0, "gcs_server_port": options.port,
            "ray_client_server_port": options.ray_client_server_port,
            "include_dashboard": True, "dashboard_host": "127.0.0.1",
            "dashboard_port": options.dashboard_port,
            "dashboard_agent_listen_port": options.dashboard_agent_listen_port,
        },
    )  # fmt: skip
    for index in range(options.nodes):
        # each node sees its own GPU only: otherwise every one of them would give out the first
        own: dict[str, Any] = {}
        if options.gpus:
            own = {"num_gpus": 1, "env_vars": {"CUDA_VISIBLE_DEVICES": str(index)}}
        cluster.add_node(**common, num_cpus=options.cpus, **own)
    print(f"{options.nodes} nodes are up", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
