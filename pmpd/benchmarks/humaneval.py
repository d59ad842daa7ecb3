"""HumanEval: complete a Python function so that its tests pass (Chen et al. 2021).

Scoring runs the generated code, so it happens only where `pmpd report --run-code` asks for it; see
`metrics/code.py` for what that code can and can't do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, key_field, text_field
from pmpd.metrics.code import TESTS


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed:
    code, name = text_field(record, "prompt"), text_field(record, "entry_point").strip()
    turn = (
        "Complete this Python function. Answer with the whole function in one code block.\n\n"
        f"```python\n{code.strip()}\n```"
    )
    tests = f"{text_field(record, 'test').strip()}\n\ncheck({name})"
    return Parsed(key_field(record, "task_id"), "code", (turn,), (f"{code.rstrip()}\n{TESTS}{tests}",))


BENCHMARK = Benchmark(
    name="humaneval",
    version="1",
    make=make,
    metric="tests_passed",
    reference="dataset",
    max_new_tokens=400,
    schema='{"task_id": "…", "prompt": "def …", "test": "def check(candidate): …", "entry_point": "…"}',
    hub={"path": "openai/openai_humaneval"},
    splits={"test": "test"},
)
