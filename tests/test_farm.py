"""The farm on one Ray: every item once, whatever dies, is damaged, or runs beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from pmpd import farm, storage
from pmpd.cli.main import main as pmpd_command
from pmpd.farm import capacity
from pmpd.farm.capacity import Demand, Staffing, check_capacity, node_types_in, staff
from pmpd.farm.task import UnitResult, WorkerInfo
from pmpd.storage.summary import read_summary
from tests import farm_fakes
from tests.farm_fakes import FakeTask, answers, expected, rows_of, shards, write_prompts
from tests.ray_sessions import environment, local_ray

COUNT = 60


@pytest.fixture(scope="module")
def cluster():
    with local_ray(2):
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def ids(prompts):
    return write_prompts(prompts, COUNT)


@pytest.fixture
def work(cluster, prompts, ids, tmp_path):
    """work(task, **options) -> (result, rows by id, what was printed); always into the same folder."""

    def run(task: FakeTask, config: dict | None = None, **options):
        printed = io.StringIO()
        options = {"num_workers": 1, "unit_rows": 10, **options}
        try:
            result = farm.run(
                task,
                {"prompts": str(prompts)},
                tmp_path / "out",
                config or {"a": 1},
                farm.FarmOptions(**options),
                stream=printed,
            )
        except Exception as error:
            error.add_note(printed.getvalue())
            raise
        return result, rows_of(tmp_path / "out"), printed.getvalue()

    return run


def test_every_item_once_and_a_second_run_does_nothing(work, prompts, tmp_path):
    result, rows, printed = work(FakeTask(), num_workers=2)
    assert answers(rows) == expected(prompts)
    assert (result.rows, result.errors, result.new_items) == (COUNT, 0, COUNT)
    assert all(row["worker"] for row in rows.values())
    assert {json.loads(row["place"])["niceness"] for row in rows.values()} == {
        os.getpriority(os.PRIO_PROCESS, 0)
    }
    assert "60/60 rows" in printed
    before = shards(tmp_path / "out")
    for leftover in ("._lease.json.0a.tmp", ".death.0a.tmp", ".manifest.json.0a.tmp"):
        (tmp_path / "out" / leftover).touch()
    again, _, _ = work(FakeTask())
    assert again.new_items == 0
    assert shards(tmp_path / "out") == before
    assert pmpd_command(["inspect", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data",
        "manifest.json",
        "summary.json",
    ], "no lease, nothing temporary"


def test_workers_that_are_kept_do_the_next_task_and_end_with_the_block(cluster, prompts, tmp_path):
    def run(name: str, **options) -> set[str]:
        farm.run(
            FakeTask(fingerprint=name), {"prompts": str(prompts)}, tmp_path / name, {"a": 1},
            farm.FarmOptions(num_workers=1, unit_rows=10, **options), stream=io.StringIO(),
        )  # fmt: skip
        rows = rows_of(tmp_path / name)
        assert answers(rows) == expected(prompts)
        return {row["worker"] for row in rows.values()}

    with farm.keep_workers(farm.FarmOptions(num_workers=1)):
        first, second = run("first"), run("second")
    assert first == second, "a task of its own process each"
    (pid,) = (int(name.split("/")[1]) for name in second)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists(), "a worker was left"
    assert run("third") != second


@pytest.mark.slow
def test_a_worker_killed_in_mid_unit_costs_its_unit_only(work, prompts, ids, tmp_path):
    (tmp_path / "marks").mkdir()
    result, rows, printed = work(FakeTask(kills=(ids[30],), once=str(tmp_path / "marks")))
    assert answers(rows) == expected(prompts)
    assert "is gone" in printed
    assert result.errors == 0


def test_a_row_that_always_kills_becomes_an_error_row(work, prompts, ids):
    _, rows, _ = work(FakeTask(kills=(ids[30],)), unit_rows=20)
    assert {key: row["error"][:10] for key, row in rows.items() if row["error"]} == {ids[30]: "WorkerDied"}
    assert {**answers(rows), ids[30]: 0} == {**expected(prompts), ids[30]: 0}


def test_a_cuda_error_ends_the_process_and_is_charged_to_its_row(work, ids):
    _, rows, _ = work(FakeTask(poisons=(ids[3],)), unit_rows=1)
    assert [key for key, row in rows.items() if row["error"]] == [ids[3]]
    assert "CUDA error" in rows[ids[3]]["error"]


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (ray.exceptions.OutOfMemoryError, UnitResult),
        pytest.param(ray.exceptions.NodeDiedError, UnitResult, marks=pytest.mark.slow),
        pytest.param(ray.exceptions.OutOfMemoryError, WorkerInfo, marks=pytest.mark.slow),
        pytest.param(ray.exceptions.NodeDiedError, WorkerInfo, marks=pytest.mark.slow),
    ],
)
def test_however_ray_takes_a_worker_nothing_is_lost(work, prompts, monkeypatch, error, answer):
    """Ray's memory monitor and others end a worker with errors that are not the actor's own."""
    get, taken = ray.get, []

    def take_once(reference):
        result = get(reference)
        if isinstance(result, answer) and not taken:
            taken.append(result)
            raise error("taken")
        return result

    monkeypatch.setattr(ray, "get", take_once)
    result, rows, printed = work(FakeTask(), unit_rows=30)
    assert answers(rows) == expected(prompts)
    assert result.errors == 0
    assert ("could not start" if answer is WorkerInfo else "is gone") in printed


def test_a_worker_that_hangs_is_replaced_and_told_of(work, prompts, ids, tmp_path):
    (tmp_path / "marks").mkdir()
    task = FakeTask(hangs=(ids[30],), once=str(tmp_path / "marks"), seconds=0.02)
    result, rows, printed = work(task, stall_seconds=4, unit_rows=20)
    assert answers(rows) == expected(prompts)
    assert result.errors == 0
    assert "has made no progress for" in printed
    assert "it is replaced and its units are done again" in printed
    assert read_summary(str(tmp_path / "out"))["runs"][0]["stalls"] == 1


@pytest.mark.slow
def test_a_worker_process_that_stands_still_is_replaced(work, prompts, tmp_path):
    stopped: list[int] = []

    def stop() -> None:
        deadline = time.monotonic() + 120
        while not stopped and time.monotonic() < deadline:
            for path in storage.list_shards(tmp_path / "out"):
                stopped.append(int(storage.read_shard(path, ["worker"])["worker"][0].as_py().split("/")[1]))
                os.kill(stopped[0], signal.SIGSTOP)
                break
            time.sleep(0.05)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        _, rows, printed = work(FakeTask(seconds=0.1), stall_seconds=4, num_workers=1)
    finally:
        thread.join()
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert answers(rows) == expected(prompts)
    assert "has made no progress for" in printed


def test_a_worker_that_can_not_start_stops_the_run_with_its_own_words(work):
    with pytest.raises(ValueError, match="no such checkpoint: x") as raised:
        work(FakeTask(start_error="no such checkpoint: x"))
    assert (type(raised.value), str(raised.value)) == (ValueError, "no such checkpoint: x"), (
        "not a page of remote traceback"
    )
    with pytest.raises(ValueError, match="3 workers could not start"):
        work(FakeTask(start_error="crash"))


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_loses_nothing(work, prompts, tmp_path):
    with pytest.raises(ValueError, match="can't be written") as raised:
        work(FakeTask(file_size_limit=200))
    assert "Free space" in str(raised.value)
    _, rows, _ = work(FakeTask())
    assert answers(rows) == expected(prompts)


def test_what_no_node_can_hold_is_refused_within_ten_seconds(work):
    begin = time.monotonic()
    with pytest.raises(
        ValueError, match=r"a worker asks for 1 GPU on one node, the cluster has: 2 CPU, 0 GPU"
    ):
        work(FakeTask(), gpus_per_worker=1)
    assert time.monotonic() - begin < 10


@pytest.mark.slow
def test_threads_of_cpu_workers_share_the_cores(work):
    _, rows, _ = work(FakeTask(), num_workers=1)
    assert {json.loads(row["place"])["threads"] for row in rows.values()} == {2}
    assert {json.loads(row["place"])["omp"] for row in rows.values()} == {"2"}


@pytest.mark.slow
def test_threads_are_shared_by_the_workers_of_a_node(work):
    _, rows, _ = work(FakeTask(), num_workers=2)
    assert {json.loads(row["place"])["threads"] for row in rows.values()} == {1}


def test_numbers_of_a_run_are_metrics_of_the_node(work):
    import urllib.request

    thread = threading.Thread(target=work, args=(FakeTask(seconds=0.15),))
    thread.start()
    try:
        port = ray.nodes()[0]["MetricsExportPort"]
        deadline, seen = time.monotonic() + 60, ""
        while time.monotonic() < deadline and "ray_pmpd_rows_total" not in seen:
            time.sleep(1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                seen = answer.read().decode()
    finally:
        thread.join()
    lines = [line for line in seen.splitlines() if line.startswith("ray_pmpd_rows_total")]
    assert lines, "the farm's numbers are not on the metrics port"
    assert float(lines[-1].rsplit(" ", 1)[1]) == COUNT


# ------------------------------------------------------------------------------------------------ without a R


@pytest.mark.parametrize(
    ("nodes", "options", "workers", "cpus", "gpus", "per_node"),
    [
        ([{"CPU": 1}], {}, 1, 1, 0, 1),
        ([{"CPU": 2}], {}, 1, 1, 0, 1),
        ([{"CPU": 8}, {"CPU": 4}], {}, 6, 1, 0, 3),
        ([{"CPU": 1}], {"num_workers": 3}, 3, 0.33, 0, 3),
        ([{"CPU": 2}, {"CPU": 2}], {"num_workers": 6}, 6, 0.66, 0, 3),
        ([{"CPU": 0}, {"CPU": 4, "GPU": 4}], {}, 4, 0, 1, 1),
        ([{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 2}], {"gpus_per_worker": 0.5}, 6, 0, 0.5, 1),
        ([{"CPU": 4, "GPU": 1}], {"gpus_per_worker": 0}, 2, 1, 0, 2),
        ([{"CPU": 4}], {"gpus_per_worker": 1, "num_workers": 8}, 8, 0, 1, 1),
    ],
)
def test_plan_fits_workers_to_nodes(nodes, options, workers, cpus, gpus, per_node):
    found = staff(farm.FarmOptions(**options), nodes)
    assert found == Staffing(workers, Demand(pytest.approx(cpus), gpus), per_node)


def test_a_worker_that_only_an_autoscaler_can_place_is_waited_for(monkeypatch):
    monkeypatch.setattr(capacity, "live_nodes", lambda: {"n": {"CPU": 2}})
    monkeypatch.setattr(capacity, "autoscaler_present", lambda: True)
    said: list[str] = []
    check_capacity(farm.FarmOptions(gpus_per_worker=1), said.append)
    assert said == ["no node can hold a worker (1 GPU) yet; waiting for the autoscaler to bring one"]


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "types"),
    [
        (None, []),
        (
            {
                "active_nodes": {"node_0a1b": 1},
                "idle_nodes": None,
                "node_type_mapping": {"0a1b": "node_0a1b"},
            },
            [],
        ),
        (
            {"active_nodes": {}, "idle_nodes": None, "node_type_mapping": {"ffff": "ray.head.default"}},
            ["ray.head.default"],
        ),
        ({"active_nodes": {"head": 1}, "pending_launches": {"gpu": 2}}, ["gpu", "head"]),
    ],
)
def test_an_autoscaler_is_known_by_its_node_types(report, types):
    assert node_types_in({"autoscaler_report": report}) == types


# ------------------------------------------------------------------------------------------------------------


def start_driver(output: Path, prompts: Path, environment: dict, **settings) -> subprocess.Popen:
    command = [sys.executable, farm_fakes.__file__, str(output), str(prompts), json.dumps(settings)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_shards(out: Path, count: int, driver: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(storage.list_shards(out)) < count:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_driver_ended_or_killed_in_mid_run_and_run_again_with_other_settings_gives_the_same_rows(
    prompts, ids, tmp_path
):
    out = tmp_path / "out"
    with environment() as env:
        driver = start_driver(out, prompts, env, seconds=0.1, options={"num_workers": 1, "unit_rows": 3})
        wait_for_shards(out, 2, driver)
        driver.send_signal(signal.SIGTERM)
        _, complaints = driver.communicate(timeout=60)
        assert driver.returncode == 143, complaints
        assert "Traceback" not in complaints
        assert "SIGTERM" not in complaints, "no trace of Ray's own handler"
        assert not (out / "_lease.json").exists(), "an ended run leaves no lease"
        before = len(storage.scan(out).where())
        driver = start_driver(out, prompts, env, seconds=0.1, options={"num_workers": 2, "unit_rows": 4})
        wait_for_shards(out, -(-before // 3) + 2, driver)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        done = len(storage.scan(out).where())
        assert before < done < COUNT
        assert not storage.scan(out).unreadable
        assert (out / "_lease.json").exists(), "a killed run can't clean up"
        again = start_driver(out, prompts, env, options={"num_workers": 1, "unit_rows": 7})
        printed, complaints = again.communicate(timeout=180)
        assert again.returncode == 0, complaints
    assert json.loads(printed.splitlines()[-1])["new_items"] <= COUNT - done
    assert answers(rows_of(out)) == expected(prompts)
    assert pmpd_command(["inspect", str(out)]) == 0
