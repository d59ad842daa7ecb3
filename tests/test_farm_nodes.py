"""The farm on several nodes with logical GPUs: who gets which GPU, and what happens when nodes go and
come."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import defaultdict

import pytest
import ray
from rich.console import Console

from pmpd import farm, storage
from tests import farm_fakes
from tests.farm_fakes import FakeTask, answers, expected, rows_of, write_prompts
from tests.ray_sessions import QUIET, environment


@pytest.fixture(scope="module")
def nodes():
    """A head without work (no GPU) and one node with two GPUs; tests add more and take them away again."""
    from ray.cluster_utils import Cluster

    with environment():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=2, num_gpus=2)
        ray.init(address=cluster.address, **QUIET)
        ray.cloudpickle.register_pickle_by_value(farm_fakes)
        try:
            yield cluster
        finally:
            ray.cloudpickle.unregister_pickle_by_value(farm_fakes)
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def prompts(tmp_path):
    write_prompts(tmp_path / "prompts", 40)
    return tmp_path / "prompts"


def run(task, prompts, folder, **options):
    stream = io.StringIO()
    options = farm.FarmOptions(**{"unit_rows": 4, "progress_seconds": 1, **options})
    farm.run(task, {"prompts": str(prompts)}, folder, {}, options, stream=stream)
    return rows_of(folder), stream.getvalue()


def test_each_worker_has_its_own_gpu_and_its_share_of_the_threads(nodes, prompts, tmp_path):
    rows, _ = run(FakeTask(seconds=0.1), prompts, tmp_path / "out")
    assert answers(rows) == expected(prompts)
    gpus = defaultdict(set)
    for row in rows.values():
        place = json.loads(row["place"])
        gpus[row["worker"]].add(tuple(place["gpus"]))
        assert place["threads"] == 1
    assert sorted(gpus.values(), key=sorted) == [{("0",)}, {("1",)}]


@pytest.mark.slow
def test_a_fraction_puts_several_workers_on_one_gpu(nodes, prompts, tmp_path):
    rows, _ = run(FakeTask(seconds=0.15), prompts, tmp_path / "out", gpus_per_worker=0.5)
    assert len({row["worker"] for row in rows.values()}) == 4
    assert {tuple(json.loads(row["place"])["gpus"]) for row in rows.values()} == {("0",), ("1",)}


def test_a_run_lives_through_a_lost_node_and_takes_in_a_new_one(nodes, prompts, tmp_path):
    """Rows are those of an undisturbed run with another unit size and number of workers."""
    doomed = nodes.add_node(num_cpus=1, num_gpus=1)
    nodes.wait_for_nodes()
    result: dict = {}
    out = tmp_path / "out"
    thread = threading.Thread(
        target=lambda: result.update(
            zip(("rows", "printed"), run(FakeTask(seconds=0.4), prompts, out), strict=True)
        )
    )
    thread.start()
    new = None
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and len(_workers(out)) < 3:
            time.sleep(0.2)
        time.sleep(1)
        nodes.remove_node(doomed)
        new = nodes.add_node(num_cpus=1, num_gpus=1)
    finally:
        thread.join(timeout=180)
        if new is not None:
            nodes.remove_node(new)
    undisturbed, _ = run(FakeTask(), prompts, tmp_path / "undisturbed", unit_rows=7, num_workers=1)
    assert answers(result["rows"]) == answers(undisturbed) == expected(prompts)
    assert not any(row["error"] for row in result["rows"].values())
    assert "is gone (its node too)" in result["printed"]
    assert not storage.scan(out).unreadable


@pytest.mark.slow
def test_the_label_job_has_a_worker_per_logical_gpu(nodes, dense_folder, anyprec_folder, tmp_path):
    from pmpd.cli.flags.label import LabelJob
    from pmpd.cli.label import main

    (tmp_path / "texts.txt").write_text(
        "\n\n".join(f"{i}. " + "The quick brown fox jumps over the lazy dog. " * 8 for i in range(60))
    )
    paths = {
        "model_path": str(anyprec_folder()),
        "reference_model_path": str(dense_folder()),
        "dataset": str(tmp_path / "texts.txt"),
    }
    main(
        LabelJob(
            **paths, max_new_tokens=64, batch_size=2, kernel="reference", output_dir=str(tmp_path / "out")
        ),
        Console(quiet=True),
    )
    rows = storage.read_table(tmp_path / "out" / "labels").to_pylist()
    assert len(rows) == 60
    assert {row["worker"].rpartition("/")[2] for row in rows} == {"gpu0", "gpu1"}


@pytest.mark.slow
def test_a_node_lost_while_its_worker_starts_is_no_failure_of_a_start(nodes, prompts, tmp_path):
    (tmp_path / "marks").mkdir()
    doomed = nodes.add_node(num_cpus=1, num_gpus=1)
    nodes.wait_for_nodes()
    task = FakeTask(seconds=0.3, bad_nodes=(doomed.node_id,), start_marks=str(tmp_path / "marks"))
    result: dict = {}
    thread = threading.Thread(
        target=lambda: result.update(
            zip(("rows", "printed"), run(task, prompts, tmp_path / "out"), strict=True)
        )
    )
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (tmp_path / "marks" / doomed.node_id).exists():
            time.sleep(0.1)
    finally:
        nodes.remove_node(doomed)
        thread.join(timeout=120)
    assert answers(result["rows"]) == expected(prompts)
    assert "went while a worker started there" in result["printed"]
    assert "could not start" not in result["printed"]


@pytest.mark.slow
def test_a_node_that_can_start_no_worker_does_not_stop_the_others(nodes, prompts, tmp_path):
    """It fails at once, three times over, while the others still load their models."""
    broken = nodes.add_node(num_cpus=1, num_gpus=3)
    nodes.wait_for_nodes()
    try:
        task = FakeTask(start_error="no such checkpoint", start_seconds=3, bad_nodes=(broken.node_id,))
        rows, printed = run(task, prompts, tmp_path / "out")
    finally:
        nodes.remove_node(broken)
    assert answers(rows) == expected(prompts)
    assert printed.count("a worker could not start on") == 3


@pytest.mark.slow
def test_workers_of_a_node_that_is_told_to_go_get_no_new_units(nodes, prompts, tmp_path):
    """What a cloud's spot notice becomes in Ray."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    doomed = nodes.add_node(num_cpus=1, num_gpus=1)
    nodes.wait_for_nodes()
    out, result = tmp_path / "out", {}
    thread = threading.Thread(
        target=lambda: result.update(
            zip(("rows", "printed"), run(FakeTask(seconds=0.5), prompts, out, unit_rows=1), strict=True)
        )
    )
    thread.start()
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and len(_workers(out)) < 3:
            time.sleep(0.2)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = ray._raylet.GcsClient(address=nodes.address)
        accepted, why = client.drain_node(
            doomed.node_id, reason, "spot notice", int((time.time() + 600) * 1000)
        )
        assert accepted, why
    finally:
        thread.join(timeout=180)
        nodes.remove_node(doomed)
    assert f"node {doomed.node_id[:8]} is about to go: its workers get no new units" in result["printed"]
    assert "is gone" not in result["printed"]
    assert answers(result["rows"]) == expected(prompts)


@pytest.mark.slow
def test_a_run_without_a_node_for_its_workers_waits_and_then_says_so(nodes, prompts, tmp_path):
    only = nodes.add_node(num_cpus=1, num_gpus=3)
    nodes.wait_for_nodes()
    told: list[str] = []

    def work():
        try:
            options = farm.FarmOptions(unit_rows=4, node_wait_seconds=3)
            object.__setattr__(options, "gpus_per_worker", 3)  # what only that node has
            inputs = {"prompts": str(prompts)}
            farm.run(FakeTask(seconds=0.3), inputs, tmp_path / "out", {}, options, stream=io.StringIO())
        except ValueError as error:
            told.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _workers(tmp_path / "out"):
            time.sleep(0.1)
    finally:
        nodes.remove_node(only)
        thread.join(timeout=120)
    assert told
    assert told[0].startswith("for 3 s no node could hold a worker (3 GPU); finished rows are kept")


def _workers(out):
    try:
        return set(storage.read_table(out, ["worker"])["worker"].to_pylist())
    except ValueError:
        return set()
