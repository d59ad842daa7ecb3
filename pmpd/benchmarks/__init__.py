"""The benchmarks, by name. Each is one file with its version, its prompts and its published record schema."""

from __future__ import annotations

from pmpd.benchmarks import cnn_dm, demo, dialogsum, gsm8k, humaneval, iwslt, mt_bench, passkey
from pmpd.benchmarks.base import Benchmark, Question, load_questions
from pmpd.errors import UserError

BENCHMARKS: dict[str, Benchmark] = {
    "demo": demo.BENCHMARK,
    "mt_bench": mt_bench.BENCHMARK,
    "cnn_dm": cnn_dm.BENCHMARK,
    "dialogsum": dialogsum.BENCHMARK,
    "iwslt": iwslt.BENCHMARK,
    "gsm8k": gsm8k.BENCHMARK,
    "passkey": passkey.BENCHMARK,
    "humaneval": humaneval.BENCHMARK,
}


ALIASES = {"IWSLT": "iwslt", "dsum": "dialogsum"}
"""Names of the published command."""


def get_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`; a UserError lists those that exist."""
    known = ALIASES.get(name, name)
    if known not in BENCHMARKS:
        raise UserError(f"--bench-name {name}: known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[known]


__all__ = ["BENCHMARKS", "Benchmark", "Question", "get_benchmark", "load_questions"]
