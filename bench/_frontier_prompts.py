"""The two kinds of prompt of the scheduler study: continuations of real texts, and instructions.

Both come from the second half of the texts' records, so that a quantizer that was calibrated on the first
half (as `bench.quantize` does it) has seen none of them. Records follow each other by article, so
neighbouring lines are kept together when prompts are split (`GROUP_LINES`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pmpd.labeling.prompts import PromptConfig, records

GROUP_LINES = 10
"""Lines of a file that are of one group: of five records, about one article."""

PART_CHARACTERS = 500
"""A record of twice as many gives two passages."""

TASKS = (
    "Summarize the following text in two sentences.",
    "Rewrite the following passage as a short email to a colleague.",
    "What are the three most important facts in this text? Answer as a list.",
    "Explain the following text to a child of ten years.",
    "Write a title for this text, then say why you chose it.",
    "Ask three questions that a reader of this text could have, and answer them.",
    "Write what could come next in this text, in the same style.",
    "Is the following text neutral? Give reasons for your opinion.",
)


def group_of(source: str) -> str:
    """The group of a prompt by where its record came from: neighbouring lines of a file ("texts.jsonl:17"),
    or one folder of documents ("email/get_bare_quoted_string")."""
    line = source.rsplit(":", 1)[-1]
    return str(int(line) // GROUP_LINES) if line.isdigit() else source.rpartition("/")[0]


def passages(texts: str, whole: bool = False) -> list[str]:
    """Two passages of each record of the second half (`whole`: of all), in order."""
    found = [text for _, text, problem in records(PromptConfig(texts)) if problem is None]
    long = [text for text in found[0 if whole else len(found) // 2 :] if len(text) >= 2 * PART_CHARACTERS]
    return [part for text in long for part in (text[:PART_CHARACTERS], _from_sentence(text))]


def _from_sentence(text: str) -> str:
    """From the first sentence that begins in the second half of the text."""
    middle = len(text) // 2
    at = text.find(". ", middle)
    return text[at + 2 :] if middle <= at < len(text) - 200 else text[middle:]


def instructions(parts: Sequence[str], characters: int = 350) -> list[str]:
    """A task and a passage for each of `parts`, the tasks in turn; passages end with a word."""
    return [
        f"{TASKS[index % len(TASKS)]}\n\n{part[:characters].rsplit(' ', 1)[0]}"
        for index, part in enumerate(parts)
    ]


def write(
    texts: str, questions: str | None, folder: Path, continuations: int, tasks: int, whole: bool = False
) -> dict[str, int]:
    """`continuations.jsonl` and `instructions.jsonl` (fields `text`): passages, and questions (a file of
    FastChat's schema, first turns) followed by tasks. File -> lines."""
    parts = passages(texts, whole)
    asked = []
    if questions is not None:
        asked = [json.loads(line)["turns"][0] for line in Path(questions).read_text().splitlines() if line]
    files = {
        "continuations": parts[:continuations],
        "instructions": asked + instructions(parts[continuations : continuations + tasks]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content)
    return {name: len(lines) for name, lines in files.items()}
