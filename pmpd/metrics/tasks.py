"""Metrics of tasks with one right answer: numbers and keys."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, commas between thousands aside; None where there is none."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def final_number_right(answer: str, reference: str) -> float:
    """1 where the last number of the answer is that of the reference (of GSM8K: what follows `####`)."""
    right = last_number(reference)
    return float(right is not None and last_number(answer) == right)


def key_found(answer: str, reference: str) -> float:
    """1 where the first number of the answer, digit by digit, is the key."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] == reference.strip())
