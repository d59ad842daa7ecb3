"""A cluster that has no worker yet: the run waits, nodes come, it finishes, and they go.

Ray's fake provider stands for a cloud: its nodes are raylets on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.farm_fakes import answers, expected, rows_of, write_prompts
from tests.ray_sessions import ROOT, environment
from tests.test_label_job import free_port

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"

DRIVER = """
import json, sys, threading, time
import ray
from pmpd import farm
from pmpd.farm.capacity import live_nodes
sys.path.insert(0, sys.argv[3])
import farm_fakes  # not by its package, which imports torch, in this process and in every worker
ray.cloudpickle.register_pickle_by_value(farm_fakes)

def nodes():
    return sum(resources.get("GPU", 0) > 0 for resources in live_nodes().values())

def watch():
    while True:
        if not seen or seen[-1] != nodes():
            seen.append(nodes())
        time.sleep(0.2)

options = farm.FarmOptions(num_workers=3, gpus_per_worker=1, unit_rows=2, progress_seconds=0.5)
farm.connect(options)
seen = [nodes()]
threading.Thread(target=watch, daemon=True).start()
farm.run(farm_fakes.FakeTask(seconds=1), {"prompts": sys.argv[1]}, sys.argv[2], {}, options)
deadline = time.monotonic() + 120
while nodes() and time.monotonic() < deadline:
    time.sleep(0.2)
time.sleep(0.5)
print(json.dumps(seen))
"""


@pytest.fixture
def autoscaling(tmp_path):
    """The environment of a driver on a head without GPUs, to which up to three nodes with one each can be
    added."""
    port = free_port()
    gpu_node = {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3}
    config = {
        "cluster_name": "fake",
        "max_workers": 3,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            "use_node_id_as_ip": True,  # all nodes have one address here
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": gpu_node,
        },
        "head_node_type": "ray.head.default",
        "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [],
    }  # fmt: skip
    (tmp_path / "cluster.json").write_text(json.dumps(config))
    command = [
        Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
        "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir=/tmp/ray-a{os.getpid()}",
        f"--autoscaling-config={tmp_path / 'cluster.json'}",
    ]  # fmt: skip
    with environment() as env:
        loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # as pmpd.farm.ray_private.loopback_only
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        with open(tmp_path / "head.log", "w") as log:
            head = subprocess.Popen(command, env={**env, **loopback, **fake}, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in (tmp_path / "head.log").read_text():
                assert head.poll() is None, (tmp_path / "head.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
                time.sleep(0.2)
            yield {**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            head.terminate()
            head.wait(timeout=60)


@pytest.mark.slow
def test_a_run_waits_for_nodes_grows_finishes_and_lets_them_go(autoscaling, tmp_path):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    write_prompts(prompts, 60)
    command = [sys.executable, "-c", DRIVER, str(prompts), str(out), str(ROOT / "tests")]
    done = subprocess.run(
        command, cwd=ROOT, env=autoscaling, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no node can hold a worker (1 GPU) yet; waiting for the autoscaler to bring one" in done.stderr
    assert "workers 0/" in done.stderr, "it waits"
    assert "workers 3/3" in done.stderr, "it grows"
    assert answers(rows_of(out)) == expected(prompts), "it finishes"
    seen = json.loads(done.stdout)
    assert (seen[0], max(seen), seen[-1]) == (0, 3, 0), "and it shrinks"
