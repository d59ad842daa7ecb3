"""The extensions of docs/guides/extensions.md, as they stand there, arrive through the commands."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from pmpd import plugins, storage
from pmpd.benchmarks import BENCHMARKS
from pmpd.cli.main import COMMANDS, main
from pmpd.kernels import dispatch
from pmpd.labeling.rule import RULES
from pmpd.metrics.base import METRICS
from pmpd.schedulers import SCHEDULERS
from pmpd.storage.files import FILE_SYSTEMS
from pmpd.weights.formats import FORMATS
from tests.helpers import write_dense
from tests.ray_sessions import ROOT, local_ray
from tests.test_extensions_weights import write_row_scale

GUIDE = (ROOT / "docs" / "guides" / "extensions.md").read_text()
EXTENSIONS = dict(re.findall(r'```python title="(\w+)\.py"\n(.*?)```', GUIDE, re.DOTALL))
NAMES = ("box", "by_length", "capitals", "lengths", "rebuilt", "row_scale", "same_start")


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """All of them where Python finds them, in a process that has loaded none."""
    for name, code in EXTENSIONS.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(plugins, "_loaded", [])
    for registry in (SCHEDULERS, RULES, METRICS, BENCHMARKS, dispatch.KERNELS, FORMATS):
        for name in {*registry} & {*NAMES, "named"}:
            monkeypatch.delitem(registry, name)
    before = [(registry, dict(registry)) for registry in (SCHEDULERS, RULES, METRICS, BENCHMARKS, FORMATS)]
    before += [(registry, dict(registry)) for registry in (dispatch.KERNELS, FILE_SYSTEMS)]
    yield str(tmp_path)
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def test_each_is_a_file_of_at_most_40_lines() -> None:
    assert tuple(sorted(EXTENSIONS)) == NAMES
    assert max(len(code.splitlines()) for code in EXTENSIONS.values()) <= 40


def label(outside: str, dense_folder, anyprec_folder, workers: int) -> list[dict]:
    Path(outside, "texts.txt").write_text("one text here\n\nanother text there\n\na third one of words")
    models = ["--model-path", str(anyprec_folder()), "--reference-model-path", str(dense_folder())]
    wanted = ["--plugins", "same_start,rebuilt", "--rule", "same_start", "--kernel", "rebuilt"]
    where = ["--dataset", f"{outside}/texts.txt", "--output-dir", f"{outside}/label", "--max-new-tokens", "4"]
    assert main(["label", *models, *wanted, *where, "--num-workers", str(workers)]) == 0
    return storage.read_table(f"{outside}/label/labels").to_pylist()


def test_a_rule_and_a_kernel_label(outside: str, dense_folder, anyprec_folder) -> None:
    rows = label(outside, dense_folder, anyprec_folder, 0)
    assert {(row["rule"], row["error"]) for row in rows} == {("same_start/3/v1", None)}


def test_a_store_holds_all_and_a_task_of_ones_own_reads_it(
    outside: str, dense_folder, anyprec_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(outside, "box").mkdir()
    monkeypatch.setenv("BOX_FOLDER", f"{outside}/box")
    Path(outside, "texts.txt").write_text("one text here\n\nanother text there\n\na third one of words")
    models = ["--model-path", str(anyprec_folder()), "--reference-model-path", str(dense_folder())]
    where = ["--plugins", "box", "--dataset", f"{outside}/texts.txt", "--output-dir", "box:///label"]
    more = ["--rule", "agreement", "--max-new-tokens", "4", "--num-workers", "0", "--kernel", "reference"]
    assert main(["label", *models, *where, *more]) == 0
    prompts = storage.read_table("box:///label/prompts").to_pylist()
    assert len(storage.read_table(f"{outside}/box/label/labels")) == len(prompts) == 3
    for command in (["inspect", "box:///label"], ["compact", "box:///label/labels"]):
        monkeypatch.setattr(plugins, "_loaded", [])
        FILE_SYSTEMS.clear()
        monkeypatch.delitem(sys.modules, "box")
        assert main([*command, "--plugins", "box"]) == 0
    lengths = importlib.import_module("lengths")
    result = lengths.main("box:///label/prompts", f"{outside}/lengths", num_workers=0)
    assert (result.rows, result.errors) == (3, 0)
    found = {row["prompt_id"]: row["words"] for row in storage.read_table(result.dataset).to_pylist()}
    assert found == {row["prompt_id"]: len(row["prompt_text"].split()) for row in prompts}
    assert lengths.main("box:///label/prompts", f"{outside}/lengths", num_workers=0).new_items == 0


@pytest.mark.slow
def test_workers_load_what_the_command_loads(outside: str, dense_folder, anyprec_folder) -> None:
    """Rule and kernel are unknown to a worker's process until it imports them."""
    with local_ray(2, runtime_env={"env_vars": {"PYTHONPATH": f"{outside}:{ROOT}"}}):
        rows = label(outside, dense_folder, anyprec_folder, 1)
    assert {(row["rule"], row["error"]) for row in rows} == {("same_start/3/v1", None)}


def test_a_scheduler_a_benchmark_and_a_metric_reach_the_report(
    outside: str, dense_folder, anyprec_folder
) -> None:
    questions = [{"country": name, "capital": "a"} for name in ("France", "Ghana", "Peru")]
    Path(outside, "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    flags = ["--model-path", str(anyprec_folder()), "--bench-name", "capitals", "--kernel", "reference"]
    more = [
        "--question-file",
        f"{outside}/q.jsonl",
        "--schedulers",
        "uniform,by_length",
        "--num-workers",
        "0",
    ]
    out = ["--output-dir", f"{outside}/out"]
    assert main(["generate", "--plugins", "by_length,capitals", *flags, *more, *out]) == 0
    inputs = ["--inputs", f"{outside}/out/capitals", "--resamples", "100"]
    assert main(["report", "--plugins", "capitals", *inputs, "--output-dir", f"{outside}/report"]) == 0
    page = Path(outside, "report", "report.html").read_text()
    assert "</span>by_length</th>" in page
    assert page.count("capital named") > 3, "figure, table of runs, table of metrics"


def test_a_weight_format_loads_and_a_kernel_is_explained(outside: str, capsys) -> None:
    folder = write_row_scale(Path(outside, "model"), write_dense(Path(outside, "dense")))
    Path(outside, "texts.txt").write_text("some words of a text that is long enough")
    flags = ["--model-path", str(folder), "--dataset", f"{outside}/texts.txt"]
    assert main(["perplexity", "--plugins", "row_scale", *flags]) == 0
    assert re.search(r"8 .*\n.*4 ", capsys.readouterr().out)
    assert main(["kernels", "--plugins", "rebuilt"]) == 0
    (line,) = re.findall(r"^ +rebuilt +(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert line == "float32, bfloat16 (else: it is not made for float16)"
    assert main(["kernels", "--plugins", "no_such"]) == 1
    assert "--plugins no_such: No module named 'no_such'" in capsys.readouterr().err


def test_every_command_takes_plugins() -> None:
    for name, command in COMMANDS.items():
        flags = importlib.import_module(f"pmpd.cli.flags.{command.module}")
        assert "plugins" in {field.name for field in dataclasses.fields(getattr(flags, command.flags))}, name
