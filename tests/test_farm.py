"""The farm on one Ray: every item once, whatever dies, is damaged, or runs beside it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from pmpd import farm, storage
from pmpd.cli.main import main as pmpd_command
from pmpd.farm import capacity, driver, ledger, ray_private
from pmpd.farm.capacity import check_capacity, node_types_in, plan
from pmpd.farm.pool import NODE_LOSSES_BEFORE_BLAME, Pool
from pmpd.farm.progress import Progress
from pmpd.farm.worker import Place, Unit, UnitResult, Worker, WorkerInfo, poisons_process
from pmpd.storage.lease import Lease, LeaseLostError
from tests import farm_fakes
from tests.farm_fakes import FakeTask, write_prompts
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


def rows_of(folder: Path) -> dict[str, dict]:
    rows = storage.read_table(folder).to_pylist()
    assert len({row["prompt_id"] for row in rows}) == len(rows), "an id is there twice"
    return {row["prompt_id"]: row for row in rows}


def expected(prompts: Path) -> dict[str, int]:
    return {row["prompt_id"]: sum(row["input_ids"]) for row in storage.read_table(prompts).to_pylist()}


def answers(rows: dict[str, dict]) -> dict[str, int]:
    return {key: row["answer"] for key, row in rows.items()}


def shards(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}


def test_every_item_once_and_a_second_run_does_nothing(work, prompts, tmp_path):
    result, rows, printed = work(FakeTask(), num_workers=2)
    assert answers(rows) == expected(prompts)
    assert (result.rows, result.errors, result.new_items) == (COUNT, 0, COUNT)
    assert all(row["worker"] for row in rows.values())
    assert "60/60 rows" in printed
    before = shards(tmp_path / "out")
    for leftover in ("._lease.json.0a.tmp", ".death.0a.tmp", ".manifest.json.0a.tmp"):
        (tmp_path / "out" / leftover).touch()
    again, _, _ = work(FakeTask())
    assert again.new_items == 0
    assert shards(tmp_path / "out") == before
    assert pmpd_command(["inspect", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "manifest.json"], (
        "no lease, nothing temporary"
    )


def test_rows_that_raise_are_error_rows_and_come_again_only_when_asked(work, prompts, ids):
    result, rows, _ = work(FakeTask(raises=(ids[5], ids[20])))
    assert {key for key, row in rows.items() if row["error"]} == {ids[5], ids[20]}
    assert result.errors == 2
    assert rows[ids[5]]["error"].startswith(f"RuntimeError: row {ids[5]} is bad")
    assert "farm_fakes.py" in rows[ids[5]]["error"], "the end of the traceback"
    assert rows[ids[5]]["prompt_text"] == "text 5", "what the input knows of the row is kept"
    result, rows, _ = work(FakeTask())
    assert result.new_items == 0
    assert rows[ids[5]]["error"]
    result, rows, _ = work(FakeTask(), retry_errors=True)
    assert result.new_items == 2
    assert answers(rows) == expected(prompts)


def test_a_prompt_with_an_error_is_an_error_row_and_never_reaches_the_task(cluster, tmp_path):
    ids = write_prompts(tmp_path / "prompts", 12, errors=(3,))
    farm.run(
        FakeTask(),
        {"prompts": str(tmp_path / "prompts")},
        tmp_path / "out",
        {},
        farm.FarmOptions(1, unit_rows=5),
        stream=io.StringIO(),
    )
    assert {key: row["error"] for key, row in rows_of(tmp_path / "out").items() if row["error"]} == {
        ids[3]: "prompts: the document tokenizes to nothing"
    }


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


def test_out_of_memory_does_not_end_the_process():
    class OutOfMemoryError(RuntimeError):
        pass

    assert not poisons_process(OutOfMemoryError("CUDA out of memory"))
    assert poisons_process(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("error", [ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError])
@pytest.mark.parametrize("answer", [WorkerInfo, UnitResult])
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


def test_a_value_that_its_column_can_not_hold_is_an_error_row(work, prompts, ids):
    result, rows, _ = work(FakeTask(too_large=(ids[7],)))
    assert [key for key, row in rows.items() if row["error"]] == [ids[7]]
    assert "column answer" in rows[ids[7]]["error"]
    assert {**answers(rows), ids[7]: 0} == {**expected(prompts), ids[7]: 0}
    assert result.errors == 1


def test_uris_are_output_folders_too(cluster, prompts, tmp_path):
    uri, stream = f"file://{tmp_path}/out", io.StringIO()
    for _ in range(2):
        result = farm.run(
            FakeTask(),
            {"prompts": f"file://{prompts}"},
            uri,
            {},
            farm.FarmOptions(1, unit_rows=30),
            stream=stream,
        )
        assert answers(rows_of(tmp_path / "out")) == expected(prompts)
        victim = sorted((tmp_path / "out" / "data").iterdir())[0]
        os.truncate(victim, 40)
    assert len(result.unreadable) == 1
    assert result.unreadable[0].startswith(f"{uri}/unreadable/")
    assert not (tmp_path / "out" / "_lease.json").exists()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)


def test_a_shard_damaged_after_its_commit_is_set_aside_and_done_again(work, prompts, tmp_path):
    work(FakeTask())
    victims = sorted((tmp_path / "out" / "data").iterdir())[:2]
    damage(victims[0])
    os.truncate(victims[1], 40)
    result, rows, printed = work(FakeTask())
    assert result.new_items == 20
    assert answers(rows) == expected(prompts)
    assert len(result.unreadable) == len(list((tmp_path / "out" / "unreadable").iterdir())) == 2
    assert "set aside" in printed


def test_rows_that_a_zombie_wrote_twice_stay_once(work, prompts, tmp_path):
    work(FakeTask())
    data = tmp_path / "out" / "data"
    first, second = sorted(data.iterdir())[:2]
    mixed = (
        storage.read_shard(first).slice(0, 3).to_pylist() + storage.read_shard(second).slice(0, 2).to_pylist()
    )
    storage.write_shard(storage.to_table(mixed, farm_fakes.SCHEMA), data / "part-zombie.parquet")
    _, rows, _ = work(FakeTask())
    assert answers(rows) == expected(prompts)


def test_other_settings_are_refused_by_their_keys(work):
    work(FakeTask(), config={"precisions": [4, 3], "seed": 0})
    with pytest.raises(ValueError, match=r"precisions: \[4, 3\] -> \[4, 2\]"):
        work(FakeTask(), config={"precisions": [4, 2], "seed": 0})


def test_another_model_is_refused(work, tmp_path):
    work(FakeTask())
    sorted((tmp_path / "out" / "data").iterdir())[0].unlink()
    with pytest.raises(ValueError, match="another model"):
        work(FakeTask(fingerprint="g"))


def test_output_of_another_input_is_refused(work, tmp_path):
    work(FakeTask())
    row = {"prompt_id": "f" * 16, "answer": 1}
    storage.write_shard(
        storage.to_table([row], farm_fakes.SCHEMA), tmp_path / "out" / "data" / "part-x.parquet"
    )
    with pytest.raises(ValueError, match=r"1 ids that are not in the input, e\.g\. ffffffffffffffff"):
        work(FakeTask())


def test_a_worker_that_can_not_start_stops_the_run_with_its_own_words(work):
    with pytest.raises(ValueError, match="no such checkpoint: x") as raised:
        work(FakeTask(start_error="no such checkpoint: x"))
    assert (type(raised.value), str(raised.value)) == (ValueError, "no such checkpoint: x"), (
        "not a page of remote traceback"
    )
    with pytest.raises(ValueError, match="3 workers could not start"):
        work(FakeTask(start_error="crash"))


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


def test_an_empty_input_is_refused(cluster, tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        farm.run(FakeTask(), {"prompts": str(tmp_path)}, tmp_path / "out", {}, farm.FarmOptions())


def test_a_second_input_must_hold_every_id(cluster, prompts, tmp_path):
    some = storage.read_table(prompts).slice(0, COUNT - 2)
    storage.write_shard(some, tmp_path / "references" / "data" / "part-0.parquet")
    inputs = {"prompts": str(prompts), "references": str(tmp_path / "references")}
    with pytest.raises(ValueError, match="references lacks 2 of 60 ids"):
        farm.run(FakeTask(), inputs, tmp_path / "out", {}, farm.FarmOptions())


def test_threads_of_cpu_workers_share_the_cores(work):
    _, rows, _ = work(FakeTask(), num_workers=1)
    assert {json.loads(row["place"])["threads"] for row in rows.values()} == {2}
    assert {json.loads(row["place"])["omp"] for row in rows.values()} == {"2"}


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
    wanted, demand, found_per_node = plan(farm.FarmOptions(**options), nodes)
    assert (wanted, demand.cpus, demand.gpus, found_per_node) == (
        workers,
        pytest.approx(cpus),
        gpus,
        per_node,
    )


def test_a_worker_that_only_an_autoscaler_can_place_is_waited_for(monkeypatch):
    monkeypatch.setattr(capacity, "live_nodes", lambda: [{"CPU": 2}])
    monkeypatch.setattr(capacity, "autoscaler_present", lambda: True)
    said: list[str] = []
    check_capacity(farm.FarmOptions(gpus_per_worker=1), said.append)
    assert said == ["no node can hold a worker (1 GPU) yet; waiting for the autoscaler to bring one"]


def test_a_unit_is_blamed_for_its_fifth_lost_node_and_at_once_for_its_worker(tmp_path):
    pool = object.__new__(Pool)
    pool.dataset = str(tmp_path)
    unit, error = Unit(("a", "b"), {"prompts": (("p", 0), ("p", 1))}), ray.exceptions.ActorDiedError()
    for losses in range(1, NODE_LOSSES_BEFORE_BLAME):
        (unit,) = pool._after_death(unit, False, error)
        assert (unit.node_losses, unit.kills) == (losses, 0)
    (unit,) = pool._after_death(unit, False, error)
    assert unit.kills == 1
    assert [single.ids for single in pool._after_death(unit, True, error)] == [("a",), ("b",)]


# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch):
    """joined(RAY_ADDRESS, address left by `ray start`, error of ray.init) -> addresses given to ray.init."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_private, "use_token_file", lambda: None)

    def connect(given: str | None, left: str | None, error: Exception | None = None) -> list[str]:
        found: list[str] = []

        def init(address: str, **_) -> None:
            found.append(address)
            if error is not None:
                raise error

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray_private, "local_address", lambda: left)
        if given is None:
            monkeypatch.delenv("RAY_ADDRESS", raising=False)
        else:
            monkeypatch.setenv("RAY_ADDRESS", given)
        begin = time.monotonic()
        farm.connect()
        assert time.monotonic() - begin < 5
        return found

    return connect


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_only_a_ray_that_is_meant_for_others_is_joined(joined, listening):
    """The Ray that another run started for itself leaves no address, and one that is gone answers no more."""
    assert (
        joined(None, None)
        == joined("", None)
        == joined("auto", None)
        == joined("local", listening)
        == ["local"]
    )
    assert joined(None, "127.0.0.1:1") == ["local"], "what a Ray left behind that is gone"
    assert (
        joined(None, listening) == joined(listening, None) == joined(listening, "127.0.0.1:1") == [listening]
    )


def test_a_ray_that_can_not_be_joined_is_told_with_its_cure(joined, listening):
    with pytest.raises(ValueError, match=r"RAY_ADDRESS=127\.0\.0\.1:1: no Ray answers there; start it"):
        joined("127.0.0.1:1", None)
    with pytest.raises(
        ValueError,
        match=f"the Ray of this machine, {listening}: it refuses this process's token; put the cluster's "
        f"token",
    ):
        joined(None, listening, ray.exceptions.AuthenticationError("token"))
    with pytest.raises(ValueError, match=f"RAY_ADDRESS={listening}: it can't be joined .*give host:port"):
        joined(listening, None, ConnectionError("no"))


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


@pytest.mark.parametrize(
    "options", [{"num_workers": 0}, {"gpus_per_worker": -1}, {"gpus_per_worker": 1.5}, {"unit_rows": 0}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="--"):
        farm.FarmOptions(**options)


def test_long_prompts_go_first_and_no_worker_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "live_nodes", lambda: [{"CPU": 4}])
    write_prompts(tmp_path, 20)
    found = {"prompts": storage.scan(tmp_path)}
    where = {"prompts": found["prompts"].where()}
    units = list(
        driver._units(
            [f"{7919 * (i + 1):016x}" for i in range(20)], where, found, farm.FarmOptions(3, unit_rows=50)
        )
    )
    assert [len(unit.ids) for unit in units] == [7, 7, 6]
    assert len({unit.name for unit in units}) == 3
    same = dataclasses.replace(units[0], kills=1)
    assert same.name == units[0].name, "a unit done twice must overwrite itself"


def test_progress_is_one_line_with_all_numbers():
    stream = io.StringIO()
    progress = Progress("labels", total=100, done=10, errors=1, stream=stream, every=0)
    progress.ready()
    progress._first_ready -= 10
    progress.add(UnitResult(items=20, error_items=1, tokens=400, seconds=5))
    progress.up, progress.wanted = 2, 3
    progress.tick(force=True)
    line = stream.getvalue().splitlines()[-1]
    assert line.startswith("labels: 30/100 rows  2.00 rows/s  40 tokens/s  ETA 0:3")
    assert line.endswith("workers 2/3  errors 2")


def test_progress_is_a_bar_in_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    progress = Progress("labels", total=4, done=2, errors=0, stream=stream)
    progress.tick(force=True)
    assert stream.getvalue().startswith("\rlabels " + "█" * 12 + "░" * 12 + " 2/4 rows")


def test_a_folder_in_use_is_refused_at_once_and_says_by_whom(tmp_path):
    with Lease(tmp_path):
        begin = time.monotonic()
        with pytest.raises(ValueError, match=rf"process {os.getpid()}.*--output-dir"), Lease(tmp_path):
            pass
        assert time.monotonic() - begin < 1
    with Lease(tmp_path):
        pass


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path):
    lease = Lease(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    lease._record |= {"pid": dead.pid, "started": "1"}
    lease._write()
    begin = time.monotonic()
    with Lease(tmp_path):
        assert time.monotonic() - begin < 2


def test_the_lease_of_another_machine_is_judged_by_its_heartbeat(tmp_path):
    other = Lease(tmp_path, beat_seconds=0.1)
    other._record |= {"host": "elsewhere", "hostname": "elsewhere", "pid": 1}
    with (
        other,
        pytest.raises(ValueError, match="in use by a run on elsewhere"),
        Lease(tmp_path, stale_seconds=1),
    ):
        pass
    other._write()  # and then no beat any more
    with Lease(tmp_path, stale_seconds=1) as mine:
        mine.check()


def test_a_run_that_lost_its_lease_stops(tmp_path):
    with Lease(tmp_path, beat_seconds=0.05) as lease:
        storage.write_bytes(lease.path, b'{"token": "another"}')
        time.sleep(0.3)
        with pytest.raises(LeaseLostError, match="another run has taken it over"):
            lease.check()
    assert storage.read_bytes(lease.path) is not None, "the other run's lease is not ours to remove"


def test_a_worker_publishes_nothing_for_a_run_that_lost_its_lease(tmp_path):
    ids = write_prompts(tmp_path / "prompts", 3)
    worker = Worker()
    worker.task, worker.dataset, worker.place = FakeTask(), str(tmp_path / "out"), Place("w", 1)
    worker.built = worker.task.build(worker.place)
    worker.lease_path, worker.lease_token = str(tmp_path / "_lease.json"), "mine"
    path = storage.list_shards(tmp_path / "prompts")[0]
    unit = Unit((ids[0],), {"prompts": ((path, 0),)})
    for content in (b'{"token": "another"}', None):
        if content is None:
            storage.remove(worker.lease_path)
        else:
            storage.write_bytes(worker.lease_path, content)
        with pytest.raises(LeaseLostError):
            worker.run(unit)
        assert storage.list_shards(tmp_path / "out") == []


def test_reconcile_names_what_is_wrong():
    schema = farm_fakes.SCHEMA
    output = storage.Scan(
        [
            storage.Shard("a", ("1", "2"), (False,) * 2, (0,) * 2, schema),
            storage.Shard("b", ("2", "9"), (False,) * 2, (0,) * 2, schema),
        ]
    )
    with pytest.raises(
        farm.ReconcileError, match=r"1 missing \(3\); 1 more than once \(2\); 1 unknown \(9\)"
    ):
        ledger.reconcile({"1": 0, "2": 0, "3": 0}, output, "out", True)


# ------------------------------------------------------------------------------------------------------------


def start_driver(output: Path, prompts: Path, environment: dict, **settings) -> subprocess.Popen:
    command = [sys.executable, farm_fakes.__file__, str(output), str(prompts), json.dumps(settings)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_driver_killed_in_mid_run_and_run_again_with_other_settings_gives_the_same_rows(
    prompts, ids, tmp_path
):
    with environment() as env:
        out = tmp_path / "out"
        driver = start_driver(out, prompts, env, seconds=0.1, options={"num_workers": 2, "unit_rows": 4})
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(storage.list_shards(out)) < 3:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        done = len(storage.scan(out).where())
        assert 0 < done < COUNT
        assert not storage.scan(out).unreadable
        assert (out / "_lease.json").exists(), "a killed run can't clean up"
        again = start_driver(out, prompts, env, options={"num_workers": 1, "unit_rows": 7})
        printed, complaints = again.communicate(timeout=180)
        assert again.returncode == 0, complaints
    assert json.loads(printed.splitlines()[-1])["new_items"] <= COUNT - done
    assert answers(rows_of(out)) == expected(prompts)
    assert pmpd_command(["inspect", str(out)]) == 0
