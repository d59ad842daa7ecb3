"""The embedded default: a dozen two-turn questions of our own about Python, and continuations of held-out
documents.

The continuation tasks take documents that the demo model was not trained on (`pmpd.demo.texts`): the prompt
is the beginning of the document, the reference is what follows. The validation split (for searches) has
continuations of validation documents only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, Split, text_field
from pmpd.errors import UserError

PROMPT_CHARACTERS = 320
REFERENCE_CHARACTERS = 480
CONTINUATIONS = 28
"""Continuation tasks of a split (fewer where the Python installation has fewer long documents)."""

QUESTIONS: tuple[tuple[str, str, str, str], ...] = (
    (
        "q01",
        "statements",
        "What does the with statement do?",
        "Which two methods must a context manager define?",
    ),
    (
        "q02",
        "statements",
        "How does the for statement use an iterator?",
        "When is the else clause of a loop executed?",
    ),
    (
        "q03",
        "statements",
        "What happens when a return statement is executed inside a try block?",
        "And what does the finally clause do?",
    ),
    ("q04", "statements", "What does the global statement declare?", "How is nonlocal different from it?"),
    (
        "q05",
        "expressions",
        "How are the arguments of a function call evaluated?",
        "What does an asterisk before an argument mean?",
    ),
    (
        "q06",
        "expressions",
        "What is the result of a comparison of two objects?",
        "How can comparisons be chained?",
    ),
    (
        "q07",
        "types",
        "Which operations do all sequence types support?",
        "Which of these operations change a list in place?",
    ),
    ("q08", "types", "What is a dictionary?", "Which objects can be used as keys?"),
    (
        "q09",
        "classes",
        "How is a class defined?",
        "How does a method of a subclass call the method of its base class?",
    ),
    (
        "q10",
        "classes",
        "When is the __getattr__ method of an object called?",
        "What must it return or raise?",
    ),
    (
        "q11",
        "library",
        "How can a program parse its command-line arguments?",
        "How is an optional argument with a default value added?",
    ),
    (
        "q12",
        "library",
        "How do you open a file and read its lines?",
        "What is raised when the file does not exist?",
    ),
)


def records(split: Split) -> Iterator[Mapping[str, Any]]:
    if split == "test":
        for key, category, first, second in QUESTIONS:
            yield {"id": key, "category": category, "turns": [first, second], "reference": None}
    from pmpd.demo.texts import documents_of

    wanted = PROMPT_CHARACTERS + REFERENCE_CHARACTERS // 2
    documents = [
        document
        for document in documents_of("held_out" if split == "test" else "validation")
        if len(document.text) >= wanted
    ]
    # By hash: a mixture of modules, and the same documents whatever else is installed before them in the
    # alphabet.
    documents.sort(key=lambda document: hashlib.sha256(document.key.encode()).digest())
    for document in documents[:CONTINUATIONS]:
        cut = document.text.rfind(" ", 0, PROMPT_CHARACTERS)
        cut = cut if cut > 0 else PROMPT_CHARACTERS
        reference = document.text[cut : cut + REFERENCE_CHARACTERS]
        yield {
            "id": document.key,
            "category": "continuation",
            "turns": [document.text[:cut]],
            "reference": reference,
        }


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed:
    turns = record.get("turns")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise UserError(f"'turns' must be a list of texts, got {turns!r}")
    category = text_field(record, "category")
    reference = text_field(record, "reference") if record.get("reference") is not None else None
    template = "raw" if category == "continuation" else None
    return Parsed(
        text_field(record, "id"), category, tuple(turns), (reference,) + (None,) * (len(turns) - 1), template
    )


BENCHMARK = Benchmark(
    name="demo",
    version="1",
    make=make,
    metric="rouge_l",
    reference="reference_output",
    max_new_tokens=128,
    schema='{"id": "…", "category": "…", "turns": ["…", "…"], "reference": "… or null"}',
    records=records,
)
