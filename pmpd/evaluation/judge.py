"""What a judge is asked about answers of two-turn questions, and what its answers mean. No network, no model.

As in FastChat's `llm_judge` (Zheng et al. 2023, "Judging LLM-as-a-Judge"): *single* gives every answer a
rating from 1 to 10; *pair* compares two runs' answers twice, each shown once as A, since judges like what
stands first. The prompts are read from a file in FastChat's form; the one that comes with the package is in
words of our own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmpd.errors import UserError

PROMPT_FILE = Path(__file__).with_name("judge_prompts.jsonl")
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
"""Categories whose answers are judged beside a reference answer."""
PROMPT_NAMES = {"single": ("single-v1", "single-math-v1"), "pair": ("pair-v2", "pair-math-v1")}
"""Mode -> names of the prompts without and with a reference; for a second turn `-multi-turn` is appended."""
FORMATS = {"single": ("single", "[[rating]]"), "pair": ("pairwise", "[[A]]")}
"""Mode -> `type` and `output_format` that its prompts must have."""


@dataclass(frozen=True)
class JudgePrompt:
    """One line of FastChat's `judge_prompts.jsonl`."""

    name: str
    system: str
    template: str

    def fill(self, texts: Mapping[str, str]) -> str:
        """The template with the texts in it; braces within them are left alone. KeyError for a name that is
        not among them."""
        return re.sub(r"\{(\w+)\}", lambda found: texts[found[1]], self.template)


@dataclass(frozen=True)
class JudgePrompts:
    """The prompts by name, and a hash of them all."""

    by_name: Mapping[str, JudgePrompt]
    digest: str


def load_judge_prompts(path: str | Path | None, mode: str) -> JudgePrompts:
    """The prompts that `mode` needs, of FastChat's `judge_prompts.jsonl` or another file in its form; None:
    the package's own. ValueError where one is missing or asks for another form of verdict."""
    file = PROMPT_FILE if path is None else Path(path)
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = {line["name"]: line for line in lines}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"--judge-prompts {file}: can't be read ({type(error).__name__}: {error}); wanted is FastChat's "
            f"judge_prompts.jsonl, or a file in its form"
        ) from None
    wanted = [name + turn for name in PROMPT_NAMES[mode] for turn in ("", "-multi-turn")]
    kind, output = FORMATS[mode]
    prompts = {}
    for name in wanted:
        line = found.get(name, {})
        if line.get("type") != kind or line.get("output_format") != output:
            raise UserError(
                f"--judge-prompts {file}: no prompt {name} of type {kind} with output_format {output}; "
                f"--mode {mode} needs {', '.join(wanted)}"
            )
        prompts[name] = JudgePrompt(name, str(line["system_prompt"]), str(line["prompt_template"]))
    content = json.dumps([vars(prompt) for prompt in prompts.values()])
    return JudgePrompts(prompts, hashlib.sha256(content.encode()).hexdigest()[:16])


# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """A question as one run answered it."""

    run: str
    prompt_id: str
    question_id: str
    category: str
    choice: int
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def answered(
    rows: Iterable[Mapping[str, Any]], turns: Mapping[str, Sequence[str]]
) -> tuple[list[Answered], int]:
    """(the questions whose every turn has an answer, how many have not), from rows of GENERATIONS and the
    questions' turns by prompt id. Sorted by run, question and choice."""
    conversations: dict[tuple[str, str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        conversations[row["run"], row["prompt_id"], row["choice"]].append(row)
    result, failed = [], 0
    for (_, prompt_id, _), found in conversations.items():
        found.sort(key=lambda row: row["turn"])
        asked = turns[prompt_id]
        if any(row["error"] for row in found) or [row["turn"] for row in found] != [
            *range(1, len(asked) + 1)
        ]:
            failed += 1
            continue
        row = found[0]
        result.append(
            Answered(
                row["run"], row["prompt_id"], row["question_id"], row["category"], row["choice"],
                tuple(asked), tuple(row["output_text"] for row in found),
            )
        )  # fmt: skip
    return sorted(result, key=lambda one: (one.run, one.question_id, one.choice)), failed


References = Mapping[str, Sequence[str]]
"""question_id -> the reference answer of each turn."""


def single_matches(
    answers: Iterable[Answered], references: References, prompts: JudgePrompts
) -> Iterator[dict[str, Any]]:
    """Rows of MATCHES: every turn of every answer, to be rated."""
    for one in answers:
        for turn in (1, 2)[: len(one.answers)]:
            texts = _question_texts(one, turn)
            names = ("answer",) if turn == 1 else ("answer_1", "answer_2")
            texts |= dict(zip(names, one.answers, strict=False))
            yield _match("single", one, turn, texts, references, prompts, None, "")


def pair_matches(
    answers: Iterable[Answered],
    pairs: Sequence[tuple[str, str]],
    references: References,
    prompts: JudgePrompts,
) -> Iterator[dict[str, Any]]:
    """Rows of MATCHES: for each pair (run, other run) every turn that both answered, with the run as A and
    with it as B."""
    by_key: dict[tuple[str, str, int], Answered] = {
        (one.run, one.prompt_id, one.choice): one for one in answers
    }
    for run, other in pairs:
        for (name, prompt, choice), one in list(by_key.items()):
            against = by_key.get((other, prompt, choice))
            if name != run or against is None:
                continue
            for turn in (1, 2)[: len(one.answers)]:
                for position in ("first", "second"):
                    a, b = (one, against) if position == "first" else (against, one)
                    texts = _question_texts(one, turn)
                    for letter, shown in (("a", a), ("b", b)):
                        field = f"answer_{letter}"
                        names = (field,) if turn == 1 else (f"{field}_1", f"{field}_2")
                        texts |= dict(zip(names, shown.answers, strict=False))
                    yield _match("pair", one, turn, texts, references, prompts, other, position)


def _question_texts(one: Answered, turn: int) -> dict[str, str]:
    if turn == 1:
        return {"question": one.questions[0]}
    return {"question_1": one.questions[0], "question_2": one.questions[1]}


def _match(
    mode: str, one: Answered, turn: int, texts: dict[str, str], references: References, prompts: JudgePrompts,
    other: str | None, position: str,
) -> dict[str, Any]:  # fmt: skip
    reference = references.get(one.question_id, ()) if one.category in REFERENCE_CATEGORIES else ()
    with_reference = len(reference) >= turn
    if with_reference:
        texts |= {f"ref_answer_{index}": text for index, text in enumerate(reference, start=1)}
    prompt = prompts.by_name[PROMPT_NAMES[mode][with_reference] + ("-multi-turn" if turn == 2 else "")]
    try:
        text = prompt.fill(texts)
    except KeyError as error:
        raise UserError(
            f"--judge-prompts: prompt {prompt.name} has the field {error}; known there are {', '.join(texts)}"
        ) from None
    identity = [mode, one.run, other, one.prompt_id, one.choice, turn, position, prompt.system, text]
    return {
        "judgment_id": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
        "mode": mode,
        "run": one.run,
        "other_run": other,
        "position": position,
        "prompt_id": one.prompt_id,
        "question_id": one.question_id,
        "category": one.category,
        "choice": one.choice,
        "turn": turn,
        "prompt_name": prompt.name,
        "system_text": prompt.system,
        "prompt_text": text,
    }


# ------------------------------------------------------------------------------------------------------------

Ask = Callable[[str, str], str]
"""(system text, user text) -> the judge's answer. ValueError, OSError: it has none."""


def judgment(match: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The row of JUDGMENTS for a match and what the judge said; one without a verdict has an error."""
    row = {name: match[name] for name in KEPT} | {"judgment_text": text, "error": None}
    if match["mode"] == "single":
        row["score"] = rating(text)
        if row["score"] is None:
            row["error"] = "no rating [[1]] to [[10]] in the judge's answer"
    else:
        letter = winner(text)
        if letter is None:
            row["error"] = "no verdict [[A]], [[B]] or [[C]] in the judge's answer"
        else:
            mine = "A" if match["position"] == "first" else "B"
            row["winner"] = "tie" if letter == "C" else "run" if letter == mine else "other"
    return row


KEPT = (
    "judgment_id", "mode", "run", "other_run", "position", "prompt_id", "question_id", "category", "choice",
    "turn", "prompt_name",
)  # fmt: skip
"""Columns of MATCHES that are in JUDGMENTS, too."""


def rating(text: str) -> float | None:
    """The number in the first `[[…]]`, else in the first `[…]`, as FastChat reads it; None where there is
    none from 1 to 10."""
    for pattern in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]"):
        found = re.search(pattern, text)
        if found:
            value = float(found[1])
            return value if 1 <= value <= 10 else None
    return None


def winner(text: str) -> str | None:
    """A, B or C (a tie), as FastChat reads it: the first of the three whose `[[…]]` is anywhere in the
    text."""
    return next((letter for letter in "ABC" if f"[[{letter}]]" in text), None)
