"""The farm in this process: what holds without a cluster. No test here starts a Ray."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from pmpd import farm, storage
from pmpd.cli.main import in_flags
from pmpd.cli.main import main as pmpd_command
from pmpd.errors import UserError
from pmpd.farm import ledger
from pmpd.farm.blame import KILLS_AT_MOST, NODE_LOSSES_BEFORE_STOP, after_kill, after_node_loss, after_stall
from pmpd.farm.ledger import Ledger, unit_rows
from pmpd.farm.progress import Progress
from pmpd.farm.task import Beat, LateRow, Place, Unit, UnitResult
from pmpd.farm.workbench import Workbench, poisons_process
from pmpd.storage import keys
from pmpd.storage.lease import LeaseLostError
from pmpd.storage.summary import read_summary
from tests import farm_fakes
from tests.farm_fakes import FakeTask, answers, damage, expected, rows_of, shards, write_prompts

COUNT = 60


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def ids(prompts):
    return write_prompts(prompts, COUNT)


@pytest.fixture
def work(prompts, ids, tmp_path):
    """work(task, **options) -> (result, rows by id, what was printed); always into the same folder."""

    def run(task: FakeTask, config: dict | None = None, **options):
        printed = io.StringIO()
        settings = farm.FarmOptions(**{"num_workers": 0, "unit_rows": 10, **options})
        inputs = {"prompts": str(prompts)}
        result = farm.run(task, inputs, tmp_path / "out", config or {"a": 1}, settings, stream=printed)
        return result, rows_of(tmp_path / "out"), printed.getvalue()

    return run


def test_every_item_once_and_a_second_run_does_nothing(work, prompts, tmp_path):
    result, rows, printed = work(FakeTask())
    assert answers(rows) == expected(prompts)
    assert (result.rows, result.errors, result.new_items) == (COUNT, 0, COUNT)
    assert "60/60 rows" in printed
    before = shards(tmp_path / "out")
    assert work(FakeTask())[0].new_items == 0
    assert shards(tmp_path / "out") == before


@pytest.mark.slow
def test_label_works_where_ray_is_not_installed(tmp_path):
    command = (
        "import sys; sys.modules['ray'] = None; from pmpd.cli.main import main; "
        "sys.exit(main(['label', '--size', '4', '--max-new-tokens', '5', '--output-dir', sys.argv[1]]))"
    )
    subprocess.run([sys.executable, "-c", command, str(tmp_path)], check=True, timeout=500)
    rows = storage.read_table(tmp_path / "labels").to_pylist()
    assert len(rows) == 4
    assert not any(row["error"] for row in rows)
    told = subprocess.run(
        [sys.executable, "-c", command.replace("'5'", "'5', '--num-workers', '2'"), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert told.returncode == 1
    assert "error: --num-workers 2: workers need Ray, which is not installed" in told.stderr


def test_the_farm_imports_ray_only_to_work_with_a_cluster():
    code = (
        "import sys; sys.modules['ray'] = None; import pmpd.farm, pmpd.farm.label_task, "
        "pmpd.farm.generate_task, pmpd.cli.label, pmpd.cli.generate; "
        "assert pmpd.farm.FarmOptions().in_process"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=400)


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


def test_a_prompt_with_an_error_is_an_error_row_and_never_reaches_the_task(tmp_path):
    ids = write_prompts(tmp_path / "prompts", 12, errors=(3,))
    farm.run(
        FakeTask(),
        {"prompts": str(tmp_path / "prompts")},
        tmp_path / "out",
        {},
        farm.FarmOptions(0, unit_rows=5),
        stream=io.StringIO(),
    )
    assert {key: row["error"] for key, row in rows_of(tmp_path / "out").items() if row["error"]} == {
        ids[3]: "prompts: the document tokenizes to nothing"
    }


def test_a_value_that_its_column_can_not_hold_is_an_error_row(work, prompts, ids):
    result, rows, _ = work(FakeTask(too_large=(ids[7],)))
    assert [key for key, row in rows.items() if row["error"]] == [ids[7]]
    assert "column answer" in rows[ids[7]]["error"]
    assert {**answers(rows), ids[7]: 0} == {**expected(prompts), ids[7]: 0}
    assert result.errors == 1


def test_uris_are_output_folders_too(prompts, ids, tmp_path):
    uri, stream = f"file://{tmp_path}/out", io.StringIO()
    for _ in range(2):
        result = farm.run(
            FakeTask(),
            {"prompts": f"file://{prompts}"},
            uri,
            {},
            farm.FarmOptions(0, unit_rows=30),
            stream=stream,
        )
        assert answers(rows_of(tmp_path / "out")) == expected(prompts)
        victim = sorted((tmp_path / "out" / "data").iterdir())[0]
        os.truncate(victim, 40)
    assert len(result.unreadable) == 1
    assert result.unreadable[0].startswith(f"{uri}/unreadable/")
    assert not (tmp_path / "out" / "_lease.json").exists()


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


def test_an_empty_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        farm.run(FakeTask(), {"prompts": str(tmp_path)}, tmp_path / "out", {}, farm.FarmOptions(0))


def test_a_second_input_must_hold_every_id(prompts, ids, tmp_path):
    some = storage.read_table(prompts).slice(0, COUNT - 2)
    storage.write_shard(some, tmp_path / "references" / "data" / "part-0.parquet")
    inputs = {"prompts": str(prompts), "references": str(tmp_path / "references")}
    with pytest.raises(ValueError, match="references lacks 2 of 60 ids"):
        farm.run(FakeTask(), inputs, tmp_path / "out", {}, farm.FarmOptions(0))


def test_out_of_memory_does_not_end_the_process():
    class OutOfMemoryError(RuntimeError):
        pass

    assert not poisons_process(OutOfMemoryError("CUDA out of memory"))
    assert poisons_process(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_reconcile_names_what_is_wrong():
    output = storage.Scan(
        ["a", "b"],
        np.array([0, 2, 4]),
        keys.encode(["1", "2", "2", "9"]),
        np.zeros(4, bool),
        np.zeros(4, np.int32),
    )
    with pytest.raises(
        farm.ReconcileError, match=r"1 missing \(3\); 1 more than once \(2\); 1 unknown \(9\)"
    ):
        ledger.reconcile(keys.encode(["1", "2", "3"]), output, "out", True)


def test_progress_is_one_line_with_all_numbers():
    stream = io.StringIO()
    progress = Progress("labels", total=100, done=10, errors=1, stream=stream, every=0)
    progress.ready()
    progress._first_ready -= 10
    progress.add(UnitResult(items=20, error_items=1, tokens=400, seconds=5))
    progress.up, progress.wanted = 2, 3
    progress.tick(force=True)
    line = stream.getvalue().splitlines()[-1]
    assert line.startswith("labels: 30/100 rows (30.0%)  2.00 rows/s  40 tokens/s  ETA 0:3")
    assert line.endswith("workers 2/3  errors 2")
    told: list[float] = []
    progress._publish = lambda numbers, by_bits: told.append(numbers["workers_up"])
    progress.end()
    assert stream.getvalue().splitlines()[-1].endswith("workers 2/3  errors 2"), "not as if none had worked"
    assert told == [2, 0], "as metrics none is up any more"


def test_a_unit_under_way_counts_by_its_forwards():
    """Before any unit ends, from the most that an item can take; then from what items took."""
    progress = Progress("labels", total=10, done=0, errors=0, stream=io.StringIO(), most_forwards=100)
    progress.ready()
    progress._first_ready -= 10
    progress.beats["w"] = Beat("u", rows=0, forwards=200, longest_seconds=0.1)
    numbers = progress.numbers()
    assert numbers["rows_done"] == 0
    assert numbers["rows_under_way"] == 2
    assert numbers["eta_seconds"] == pytest.approx(40, rel=0.05)
    assert "0/10 rows, 2 under way (20.0%)" in progress.line()
    assert "ETA <0:" in progress.line(), "an upper bound is called one"
    progress.add(UnitResult(items=2, error_items=0, tokens=80, seconds=5, forwards={4: 60, 3: 40}))
    progress.beats["w"] = Beat("v", rows=0, forwards=50, longest_seconds=0.1)
    numbers = progress.numbers()
    assert numbers["rows_under_way"] == 1
    assert numbers["eta_seconds"] == pytest.approx(70 / 3, rel=0.05)
    assert "<" not in progress.line()


def test_one_long_piece_of_work_says_what_it_is_at():
    progress = Progress("quantized", total=1, done=0, errors=0, stream=io.StringIO())
    progress.up = progress.wanted = 1
    progress.beats["w"] = Beat("u", rows=0, forwards=7, longest_seconds=0.1, doing="layers quantized 5/30")
    assert progress.line() == "layers quantized 5/30  workers 1/1  errors 0"
    progress.beats.clear()
    assert "0/1 rows" in progress.line()


def test_progress_moves_within_a_unit(work):
    _, _, printed = work(FakeTask(seconds=0.05), unit_rows=60, progress_seconds=0.5)
    lines = [line for line in printed.splitlines() if "/60 rows" in line]
    assert len(lines) >= 3, "a line every progress_seconds, while the only unit is at work"
    assert any(re.search(r" 0/60 rows, \d+ under way \(", line) for line in lines)


def test_a_run_leaves_a_summary_of_what_it_cost(work, tmp_path):
    work(FakeTask(seconds=0.02), price_per_worker_hour=3.6)
    sorted((tmp_path / "out" / "data").iterdir())[0].unlink()
    work(FakeTask(seconds=0.02), price_per_worker_hour=3.6)
    summary = read_summary(str(tmp_path / "out"))
    first, second = summary["runs"]
    assert (first["rows"], second["rows"]) == (COUNT, 10)
    assert first["tokens"] == 10 * COUNT
    assert first["forwards"] == {"4": 5 * COUNT, "3": 5 * COUNT}
    assert first["worker_seconds"] >= 0.02 * COUNT
    assert first["cost"] == pytest.approx(3.6 * first["worker_seconds"] / 3600, abs=1e-6)
    assert first["rows_per_worker_hour"] == pytest.approx(3600 * COUNT / first["worker_seconds"], abs=1e-2)
    total = summary["total"]
    assert total["rows"] == COUNT + 10
    assert total["cost_per_1000_rows"] == pytest.approx(1000 * total["cost"] / (COUNT + 10), abs=1e-5)
    work(FakeTask())
    assert len(read_summary(str(tmp_path / "out"))["runs"]) == 2, "a run that did nothing is none"


def test_progress_is_a_bar_that_fits_its_terminal(monkeypatch):
    """Written over with a carriage return, a line longer than the terminal would leave a trail of itself."""
    for name, value in {"TERM": "xterm", "COLUMNS": "60", "NO_COLOR": "1", "TTY_INTERACTIVE": "1"}.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    progress = Progress("labels", total=4, done=2, errors=0, stream=stream)
    progress.note = "waiting for a node of the autoscaler"
    progress.tick(force=True)
    progress.say("a worker could not start on [10.0.0.1]")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert shown.lstrip("\r").startswith("labels ━━━━━━━━━━━━")
    assert "".join(progress.line().split()) in re.sub("[━╸╺ \n\r]|labels:? ", "", shown), (
        "all of the line is there"
    )
    assert max(map(len, shown.splitlines())) <= 60
    assert "labels: a worker could not start on [10.0.0.1]" in shown, "no markup"


def test_long_prompts_go_first_and_no_worker_is_left_out(tmp_path):
    write_prompts(tmp_path, 20)
    book = Ledger(FakeTask(), {"prompts": str(tmp_path)}, tmp_path / "out", {})
    book.scan_inputs()
    todo = book.todo()
    units = list(book.units(todo, unit_rows(len(todo), 50, 3)))
    assert [len(unit.ids) for unit in units] == [7, 7, 6]
    assert len({unit.name for unit in units}) == 3
    lengths = {row["prompt_id"]: row["prompt_tokens"] for row in storage.read_table(tmp_path).to_pylist()}
    ordered = [lengths[key] for unit in units for key in unit.ids]
    assert ordered == sorted(ordered, reverse=True)
    same = dataclasses.replace(units[0], kills=("n",))
    assert same.name == units[0].name, "a unit done twice must overwrite itself"


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": -1},
        {"gpus_per_worker": -1},
        {"gpus_per_worker": 2},
        {"unit_rows": 0},
        {"stall_seconds": 0},
    ],
)
def test_bad_options_are_refused_in_the_words_of_the_library(options):
    (name,) = options
    with pytest.raises(UserError, match=f"^{name} "):
        farm.FarmOptions(**options)


def test_only_names_of_fields_become_flags():
    @dataclasses.dataclass
    class Job:
        output_dir: str = ""
        size: int = 1
        batch_size: int = 1

    for message, told in (
        ("slots 0: one at least", "--batch-size 0: one at least"),
        ("size 0: of what size?", "--size 0: of what size?"),
        ("change output_dir, or size", "change --output-dir, or size"),
        ("/a/output_dir/b: the output_dir", "/a/output_dir/b: the --output-dir"),
        ("output_dir=3 is 'batch_size'", "output_dir=3 is 'batch_size'"),
    ):
        assert in_flags(message, Job()) == told


def test_a_command_says_its_own_flags(capsys, tmp_path):
    for flags, told in (
        (
            ["--gpus-per-worker", "2"],
            "error: --gpus-per-worker 2: 0, a fraction like 0.5, or 1; one worker holds",
        ),
        (["--batch-size", "0"], "error: --batch-size 0: "),
        (["--max-new-tokens", "2"], "error: --max-new-tokens 2: four at least"),
    ):
        assert pmpd_command(["label", "--output-dir", str(tmp_path), *flags]) == 1
        assert told in capsys.readouterr().err


# -- who is to blame ----------------------------------------------------------------------------------------

UNIT = Unit(("a", "b"), {"prompts": (("p", 0), ("p", 1))})
ROW = dataclasses.replace(UNIT.singles()[0])


def test_a_node_that_went_is_never_a_rows_fault():
    units = [UNIT]
    for _ in range(NODE_LOSSES_BEFORE_STOP - 1):
        units = [again for unit in units for again in after_node_loss(unit)]
    assert {unit.ids for unit in units} == {("a",), ("b",)}, "one by one, so that one row holds up no other"
    assert not any(unit.failed or unit.kills for unit in units)
    row = dataclasses.replace(ROW, node_losses=NODE_LOSSES_BEFORE_STOP - 1)
    with pytest.raises(UserError, match=f"row a: {NODE_LOSSES_BEFORE_STOP} nodes went"):
        after_node_loss(row)


def test_a_row_that_kills_is_found_on_another_node():
    nodes = ["n1", "n2"]
    (once,) = after_kill(UNIT, "n1", nodes, True, "x")
    singles = after_kill(once, "n1", nodes, True, "x")
    assert [unit.ids for unit in singles] == [("a",), ("b",)]
    (still,) = after_kill(ROW, "n1", nodes, True, "x")
    assert still.failed is None, "one node alone is no witness where there is another"
    (guilty,) = after_kill(still, "n2", nodes, True, "x")
    assert guilty.failed == "WorkerDied: this row ended its worker process: x"


def test_deaths_on_a_node_that_has_gone_since_count_no_more():
    (row,) = after_kill(ROW, "n1", ["n1", "n2"], True, "x")
    (row,) = after_kill(row, "n2", ["n2"], True, "x")
    assert row.failed is None
    assert row.kills == ("n2",)


def test_where_no_other_node_can_take_it_a_row_is_judged_at_once():
    assert after_kill(ROW, "n1", ["n1"], False, "x")[0].failed
    row = ROW
    for _ in range(KILLS_AT_MOST):
        (row,) = after_kill(row, "n1", ["n1", "n2"], True, "x")
    assert row.failed, "nor for ever where the other one never takes it"


def test_a_unit_that_hangs_twice_is_taken_apart():
    (again,) = after_stall(UNIT, 300)
    singles = after_stall(again, 300)
    assert [unit.ids for unit in singles] == [("a",), ("b",)]
    assert "no progress with this row for 300 s" in after_stall(singles[0], 300)[0].failed


# -- the workbench ------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    """A workbench with its lease, and one unit of three rows."""
    ids = write_prompts(tmp_path / "prompts", 3)
    (path,) = storage.list_shards(tmp_path / "prompts")
    unit = Unit(tuple(ids), {"prompts": tuple((path, row) for row in range(3))})
    with storage.Lease(tmp_path / "out") as lease:

        def make(task: FakeTask, worker_id: str = "w") -> Workbench:
            place = Place("here", 1)
            made = Workbench(
                task, str(tmp_path / "out"), lease.path, lease.token, place, worker_id, lambda *_: None
            )
            made.build()
            return made

        yield make, unit, lease


def test_a_worker_publishes_nothing_for_a_run_that_lost_its_lease(bench, tmp_path):
    make, unit, lease = bench
    worker = make(FakeTask())
    for content in (b'{"token": "another"}', None):
        if content is None:
            storage.remove(lease.path)
        else:
            storage.write_bytes(lease.path, content)
        with pytest.raises(LeaseLostError):
            worker.run(unit)
        assert storage.list_shards(tmp_path / "out") == []


def test_a_worker_that_was_replaced_publishes_nothing_any_more(bench, tmp_path):
    make, unit, lease = bench
    late, other = make(FakeTask(seconds=0.2), "late"), make(FakeTask(), "other")
    ended: list[BaseException] = []

    def work() -> None:
        try:
            late.run(unit)
        except LeaseLostError as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    lease.revoke("late")
    thread.join()
    assert "this worker has been replaced; nothing was written" in str(ended[0])
    assert storage.list_shards(tmp_path / "out") == []
    other.run(unit)
    assert len(storage.list_shards(tmp_path / "out")) == 1, "the one that replaced it does publish"


@dataclasses.dataclass(frozen=True)
class OfferedTask(FakeTask):
    """A `FakeTask` that asks for the next unit's items and can't bear the row `bad` of them; each unit waits
    until another one does."""

    bad: str = ""
    others: threading.Event = dataclasses.field(default_factory=threading.Event)
    offered: list = dataclasses.field(default_factory=list)

    def build(self, place):
        built, ask = super().build(place), []

        def run(items):
            assert self.others.wait(60)
            time.sleep(0.2)  # until the other unit has been read, too
            early = [item["prompts"]["prompt_id"] for of in ask for item in of()]
            self.offered.append(early)
            if self.bad in early:
                raise RuntimeError("a row of the next unit")
            yield from built.run(items)

        return dataclasses.replace(built, run=run, offers=ask.append)


@pytest.mark.parametrize("bad", [False, True])
def test_items_of_the_unit_that_waits_are_on_offer_once_and_never_cost_a_row_of_another(bench, bad):
    make, unit, _ = bench
    first, second = (
        Unit(unit.ids[part], {"prompts": unit.rows["prompts"][part]}) for part in (slice(0, 2), slice(2, 3))
    )
    task = OfferedTask(bad=second.ids[0] if bad else "")
    worker = make(task)
    results: dict[str, UnitResult] = {}
    threads = [
        threading.Thread(target=lambda some=some: results.update({some.name: worker.run(some)}))
        for some in (first, second)
    ]
    threads[0].start()
    while worker._unit is None:
        time.sleep(0.01)
    threads[1].start()
    while not worker._next:
        time.sleep(0.01)
    task.others.set()
    for thread in threads:
        thread.join(60)
    assert task.offered[0] == list(second.ids)
    assert not any(task.offered[1:]), "offered twice, or where rows are tried one by one"
    assert [results[some.name].error_items for some in (first, second)] == [0, 0]


def test_a_unit_that_nobody_brings_meanwhile_is_read_ahead_and_on_offer(bench, monkeypatch):
    make, unit, _ = bench
    first, second = (
        Unit(unit.ids[part], {"prompts": unit.rows["prompts"][part]}) for part in (slice(0, 2), slice(2, 3))
    )
    task = OfferedTask()
    task.others.set()
    worker, reads = make(task), []
    read = worker._read
    monkeypatch.setattr(worker, "_read", lambda one: reads.append(one.name) or read(one))
    assert worker.run(first, second).error_items == 0
    assert worker.run(second).error_items == 0
    assert task.offered == [list(second.ids), []]
    assert reads == [first.name, second.name], "read twice"


@dataclasses.dataclass(frozen=True)
class LateTask(FakeTask):
    """A `FakeTask` whose rows come once `others` is set, which the unit of the row `last` does."""

    last: str = ""
    others: threading.Event = dataclasses.field(default_factory=threading.Event)

    def build(self, place):
        built = super().build(place)

        def run(items):
            for item in items:
                key = item["prompts"]["prompt_id"]
                if key == self.last:
                    self.others.set()

                def row(item=item):
                    assert self.others.wait(60), "the next unit waited for rows that need no device"
                    return next(iter(built.run([item])))

                yield LateRow(key, row)

        return dataclasses.replace(built, run=run)


def test_late_rows_are_made_beside_the_next_unit_and_an_exception_is_of_its_row(bench, tmp_path):
    make, unit, _ = bench
    first, second = (
        Unit(unit.ids[part], {"prompts": unit.rows["prompts"][part]}) for part in (slice(0, 2), slice(2, 3))
    )
    worker = make(LateTask(raises=(first.ids[0],), last=second.ids[0]))
    results: dict[str, UnitResult] = {}
    threads = [
        threading.Thread(target=lambda some=some: results.update({some.name: worker.run(some)}))
        for some in (first, second)
    ]
    threads[0].start()
    while not worker._writing.locked():  # its turn is over
        time.sleep(0.01)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert [results[some.name].error_items for some in (first, second)] == [1, 0]
    rows = storage.read_table(tmp_path / "out").to_pylist()
    assert {row["prompt_id"]: bool(row["error"]) for row in rows} == {
        key: key == first.ids[0] for key in unit.ids
    }


def test_a_lease_lost_while_rows_are_late_leaves_nothing_written_or_locked(bench, tmp_path):
    make, unit, lease = bench
    task, ended = LateTask(), []
    worker = make(task)

    def work() -> None:
        try:
            worker.run(unit)
        except LeaseLostError as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not worker._writing.locked():
        time.sleep(0.01)
    storage.write_bytes(lease.path, b'{"token": "another"}')
    task.others.set()
    thread.join(60)
    assert ended
    assert storage.list_shards(tmp_path / "out") == []
    assert not worker._turn.locked()
    assert not worker._writing.locked()
    assert worker.beat() is None


class SteppedTask(FakeTask):
    """A `FakeTask` whose rows are late: one comes each time that `come` is released."""

    come = threading.Semaphore(0)

    def build(self, place):
        built = super().build(place)

        def made(row):
            assert self.come.acquire(timeout=60)
            return row

        def run(items):
            for row in built.run(items):
                yield LateRow(row["prompt_id"], lambda row=row: made(row))

        return dataclasses.replace(built, run=run)


@dataclasses.dataclass(frozen=True)
class HeldTask(FakeTask):
    """A `FakeTask` whose unit ends only once its last beat was read."""

    read: threading.Event = dataclasses.field(default_factory=threading.Event)

    def build(self, place):
        built = super().build(place)

        def run(items):
            yield from built.run(items)
            assert self.read.wait(60), "nobody read the last beat"

        return dataclasses.replace(built, run=run)


def test_a_beat_tells_how_far_a_unit_is(bench):
    make, unit, _ = bench
    task = HeldTask(seconds=0.2)
    worker = make(task)
    assert worker.beat() is None
    thread = threading.Thread(target=worker.run, args=(unit,))
    thread.start()
    seen: list[Beat] = []
    while thread.is_alive():
        beat = worker.beat()
        if beat is not None and beat not in seen:
            seen.append(beat)
        if beat is not None and beat.rows == 3:
            task.read.set()
        time.sleep(0.01)
    assert {beat.unit for beat in seen} == {unit.name}
    assert [beat.forwards for beat in seen] == sorted(beat.forwards for beat in seen)
    assert seen[-1].forwards == 30, "three rows of two forwards of five"
    assert 0.1 <= seen[-1].longest_seconds < 60
    assert worker.beat() is None


def test_a_beat_tells_of_late_rows_too_once_no_other_unit_is_worked_on(bench):
    """A worker whose rows take long to score has not stalled."""
    make, unit, _ = bench
    worker, come = make(SteppedTask()), SteppedTask.come
    thread = threading.Thread(target=worker.run, args=(unit,))
    thread.start()
    seen, until = [], time.monotonic() + 30
    for made in range(3):
        while worker._unit is not None or (beat := worker.beat()) is None or beat.rows < made:
            assert time.monotonic() < until, "it tells nothing of them"
            time.sleep(0.01)
        seen.append(beat)
        come.release()
    thread.join(60)
    assert [(beat.unit, beat.rows, beat.forwards) for beat in seen] == [
        (unit.name, made, 30) for made in range(3)
    ]
    assert worker.beat() is None


def test_the_next_unit_is_worked_on_while_a_shard_is_written(bench, tmp_path, monkeypatch):
    make, unit, _ = bench
    units = unit.singles()
    worker = make(FakeTask(poisons=(units[2].ids[0],)))
    order: list[str] = []
    started, write = threading.Event(), storage.write_shard

    def slow_write(table, path, *rest):
        name = next(one.ids[0] for one in units if one.name in path)
        order.append(f"write {name}")
        assert started.wait(60), "the next unit waits for the shard of the one before"
        time.sleep(0.2)
        size = write(table, path, *rest)
        order.append(f"written {name}")
        return size

    done = worker._done

    def watched(one: Unit, items):
        if one is units[1]:
            started.set()
        return done(one, items)

    monkeypatch.setattr(storage, "write_shard", slow_write)
    monkeypatch.setattr(worker, "_done", watched)
    monkeypatch.setattr(worker, "_poisoned", lambda *_: order.append("poisoned"))
    threads = []
    for one in units:
        threads.append(threading.Thread(target=worker.run, args=(one,)))
        threads[-1].start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    first, second, third = (one.ids[0] for one in units)
    told = [f"write {first}", f"written {first}", f"write {second}", f"written {second}"]
    assert [what for what in order if third not in what and what != "poisoned"] == told, (
        "in order, one at a time"
    )
    assert order.index("poisoned") > order.index(f"written {second}"), (
        "what is done is durable before it ends"
    )
    assert len(storage.list_shards(tmp_path / "out")) == 3


@pytest.mark.parametrize("one_row", [True, False])
def test_of_an_item_in_two_shards_the_one_without_error_stays(tmp_path, one_row):
    """Items of several rows may have them in one shard, and only there."""
    shards_of = {"a": [("1", True), ("2", False)], "b": [("1", False), ("3", False)], "c": [("4", False)] * 2}
    schema = storage.table_schema(
        "made", [("prompt_id", storage.PROMPTS.field(0).type), ("error", storage.PROMPTS.field(0).type)]
    )
    for name, rows in shards_of.items():
        table = storage.to_table(
            [{"prompt_id": key, "error": "x" if bad else None} for key, bad in rows], schema
        )
        storage.write_shard(table, tmp_path / "data" / f"{name}.parquet")
    assert ledger.drop_duplicates(storage.scan(tmp_path), one_row)
    left = {shard.path[-9:]: shard.ids for shard in storage.scan(tmp_path).shards}
    assert left == {"a.parquet": ("2",), "b.parquet": ("1", "3"), "c.parquet": ("4",) * (1 if one_row else 2)}
    assert not ledger.drop_duplicates(storage.scan(tmp_path), one_row)


def test_units_follow_the_shards_of_a_large_input(tmp_path):
    """A unit of neighbours in length alone would open as many files as it has rows."""
    for shard in range(100):
        rows = [{"prompt_id": f"{shard:08x}{row:08x}", "prompt_tokens": 100 + row % 3} for row in range(64)]
        storage.write_shard(
            storage.to_table(rows, storage.PROMPTS), tmp_path / "data" / f"{shard:03}.parquet"
        )
    book = Ledger(FakeTask(), {"prompts": str(tmp_path)}, tmp_path / "out", {})
    book.scan_inputs()
    units = list(book.units(book.todo(), 32))
    assert sum(len(unit.ids) for unit in units) == 6400
    assert max(len({path for path, _ in unit.rows["prompts"]}) for unit in units) <= 2
    for unit in units[:3]:
        for key, (path, row) in zip(unit.ids, unit.rows["prompts"], strict=True):
            assert storage.read_rows(path, [row])[0]["prompt_id"] == key
