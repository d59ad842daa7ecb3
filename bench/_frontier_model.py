"""The parts of the scheduler study that need a model: the check of the curves, and the decode times."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from pmpd import PMPDForCausalLM, storage
from pmpd.decode.forced import GivenTokens, forward_given
from pmpd.decode.precision import token_statistics
from pmpd.evaluation.answer import measure_forwards
from pmpd.labeling.curves import PROBE_TOKENS, exact_divergence
from pmpd.schedulers.base import STATISTICS


@dataclass(frozen=True)
class Exact:
    """Compare losses put together from curves with exact teacher-forced forwards of the same plans."""

    labels: tuple[str, ...]
    """Output folders of pmpd label --rule kl."""
    model_path: str
    reference_model_path: str
    output: Path
    prompts: int = 40
    """Of each folder, the first by id."""
    device: str = "cpu"
    switch_share: float = 0.2
    """Of the random plan that goes up and down: chance of another precision at each forward."""

    def run(self) -> None:
        model, unquantized = (
            PMPDForCausalLM(path).eval().to(self.device)
            for path in (self.model_path, self.reference_model_path)
        )
        totals: dict[str, list[tuple[float, float, int]]] = {}
        rng = np.random.default_rng(0)
        for folder in self.labels:
            columns = ["prompt_id", "input_ids", "reference_ids", "curves", "error"]
            table = storage.read_table(storage.join(folder, "labels"), columns).sort_by("prompt_id")
            for row in [row for row in table.to_pylist() if not row["error"]][: self.prompts]:
                curves = {c["bits"]: np.asarray(c["divergence"], float) for c in row["curves"]}
                chain, m = list(curves), len(row["reference_ids"]) - 1
                wander = [int(rng.choice(chain))]
                for _ in range(m - 1):
                    wander.append(int(rng.choice(chain)) if rng.random() < self.switch_share else wander[-1])
                plans = {f"uniform {bits}": [bits] * m for bits in chain}
                for a, b in pairwise(chain):
                    plans[f"{a} then {b}"] = [a] * (m // 2) + [b] * (m - m // 2)
                plans["up and down"] = wander
                exact = exact_divergence(
                    model, unquantized, row["input_ids"], row["reference_ids"], chain[0], list(plans.values())
                )
                for (name, plan), found in zip(plans.items(), exact, strict=True):
                    by_curves = sum(curves[bits][t] for t, bits in enumerate(plan))
                    totals.setdefault(name, []).append((by_curves, float(found.sum()), m))
        result = {}
        for name, parts in totals.items():
            by_curves, exact_sum, forwards = np.asarray(parts, dtype=float).T
            result[name] = {
                "prompts": len(parts),
                "by_curves": by_curves.sum() / forwards.sum(),
                "exact": exact_sum.sum() / forwards.sum(),
                "error_percent": 100 * (by_curves.sum() / exact_sum.sum() - 1),
                "correlation": float(np.corrcoef(by_curves / forwards, exact_sum / forwards)[0, 1]),
            }
        self.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result, indent=1))


@dataclass(frozen=True)
class Steps:
    """Seconds of a decode forward of a row alone at each precision, and what decisions cost."""

    model_path: str
    output: Path
    device: str = "cpu"
    repeats: int = 20
    threads: int = 1

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        model = PMPDForCausalLM(self.model_path).eval().to(self.device)
        measured = measure_forwards(model, model.precisions)
        logits = torch.randn(1, model.model.config.vocab_size, device=self.device)
        engine = model.engine(1, 256)
        ids = list(range(10, 10 + PROBE_TOKENS))

        def seconds(work) -> float:
            times = []
            for _ in range(self.repeats):
                started = time.perf_counter()
                work()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            return float(np.median(times))

        low = model.precisions[1:]
        found = {
            "threads": self.threads,
            "seconds": {str(row["bits"]): row["seconds"] for row in measured},
            "statistics_seconds": seconds(lambda: token_statistics(STATISTICS, logits).cpu()),
            "probe_seconds": len(low)
            * seconds(lambda: forward_given(engine, [GivenTokens(0, 0, ids, PROBE_TOKENS)], low[0])[0].cpu()),
        }
        self.output.write_text(json.dumps({"results": found}, indent=1) + "\n")
        print(json.dumps(found, indent=1))
