"""How the answers of a sweep are chosen, by category of question where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pmpd.decode.sampling import Sampling
from pmpd.errors import UserError

CATEGORY_TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
    "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
"""MT-Bench's temperatures (Zheng et al. 2023, as FastChat's `llm_judge` has them)."""
OTHER_TEMPERATURE = 0.7
"""Of a category that is none of them."""


@dataclass(frozen=True)
class SamplingPlan:
    """The default is greedy."""

    temperature: float | Literal["category"] = 0.0
    """"category": MT-Bench's temperature of each question's category."""
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end an answer, and are not part of it."""

    def __post_init__(self) -> None:
        if isinstance(self.temperature, str) and self.temperature != "category":
            raise UserError(f"temperature {self.temperature}: a number, or category")
        if not all(self.stop):
            raise UserError(f"stop {list(self.stop)}: strings that are not empty")
        self.of("writing")  # bad numbers are told now, not by a worker

    def of(self, category: str) -> Sampling:
        """The settings of a question."""
        temperature = (
            CATEGORY_TEMPERATURES.get(category, OTHER_TEMPERATURE)
            if isinstance(self.temperature, str)
            else self.temperature
        )
        return Sampling(temperature, self.top_p, self.top_k, self.seed, self.repetition_penalty)

    def describe(self) -> dict[str, Any]:
        """What differs from greedy; {} for greedy. The seed only where something is drawn."""
        default = asdict(SamplingPlan())
        changed = {name: value for name, value in asdict(self).items() if value != default[name]}
        if self.temperature == 0:
            for name in ("seed", "top_p", "top_k"):
                changed.pop(name, None)
        return changed


GREEDY_PLAN = SamplingPlan()
