"""Settings under which published results were made, by name, so that one flag gives them all.

Each is a line of `docs/guides/published-differences.md`, with our default beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmpd.benchmarks import get_benchmark
from pmpd.benchmarks.base import Benchmark
from pmpd.benchmarks.iwslt import BY_TARGET
from pmpd.errors import UserError


@dataclass(frozen=True)
class Preset:
    """What replaces our defaults; flags that the user gives go first."""

    max_new_tokens: Mapping[str, int]
    """By benchmark."""
    templates: Mapping[str, str]
    """Conversation template by benchmark."""
    benchmarks: Mapping[str, Benchmark]
    """Variants of benchmarks, under their names."""
    scheduler_options: Mapping[str, Mapping[str, Any]]
    """Scheduler -> its options."""
    labels: Mapping[str, str]
    """What `pmpd label` reads and by which rule: dataset, dataset_config, split, rule."""

    def benchmark(self, name: str) -> Benchmark:
        found = get_benchmark(name)
        return self.benchmarks.get(found.name, found)


NO_PRESET = Preset({}, {}, {}, {}, {})

CALIBRATION = 10
"""Scores of a row from which the published confidence threshold follows: their mean and one standard
deviation."""

PRESETS: dict[str, Preset] = {
    "published": Preset(
        max_new_tokens={"iwslt": 60, "dialogsum": 33},
        templates=dict.fromkeys(("cnn_dm", "dialogsum", "iwslt"), "claude-2"),
        benchmarks={"iwslt": BY_TARGET},
        scheduler_options={
            "static": {"published_steps": True},
            "kv_cache": {"published_steps": True},
            "confidence": {"calibration": CALIBRATION},
        },
        labels={
            "dataset": "allenai/c4",
            "dataset_config": "en",
            "split": "validation",
            "rule": "published",
        },
    )
}


def get_preset(name: str) -> Preset:
    """The preset called `name`; a UserError lists those that exist."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: known are {', '.join(PRESETS)}")
    return PRESETS[name]
