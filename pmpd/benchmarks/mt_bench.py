"""MT-Bench: 80 two-turn questions in eight categories (Zheng et al. 2023, "Judging LLM-as-a-Judge").

Two published schemas are read: FastChat's `question.jsonl` and the hub's `HuggingFaceH4/mt_bench_prompts`.
The hub numbers the questions by hashes of its own; FastChat's tools want 81 to 160. So a question is known by
the text of its turns, and goes by FastChat's number whatever file it came from.

Their `reference` answers (math, reasoning, coding) are written for a judge, not for overlap scores, so
quality here is agreement with the unquantized model; for judged scores, export the answers to FastChat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pmpd.benchmarks.base import Benchmark, CountTokens, Parsed, text_field
from pmpd.errors import UserError

_HASHES = """
67e3d7eb 284224f6 c032d9b8 ed8222eb 193e8b37 3f7c934d 1d70a5b8 bece86b6 0c023362 89645bb0
ae924e99 2fd5f0e3 8d4afc57 4d1043c3 0ec7ff65 08e1b8fa 39ffa538 3ef94b8d fc548008 eda18d8b
384d7e81 ea38e120 0b4367ec 101cccf1 fc259543 c6211c55 23b04d49 06163cf8 88667fb5 40f2ac2d
ddc9ce82 4ce79585 6c9d0bfd 759d53a3 765d9df5 0861f714 af2b245d 69edfc21 184c09b8 5258490a
f5b67535 b2b534c4 10b6fa4a 07b0c82e 74838f53 5176aaa2 e9d8ae77 49c952db 66fd7d77 3dee0e6a
57862af1 57d622be 1bcdadec d21d8647 754df43f d8f1b34f 18f31a09 4d820d9f dddc9080 05fa6a40
0c16ee07 3cc1a2d5 1002ba7d dfdd7f14 50f4a11f 9578f248 c48848b3 3b1b8d72 b9a15285 2a5ab3a8
8accbdac 477d5a2b 9e5f9295 dafb3884 471d595f 8be77b09 64275a75 59419874 47bfcfdf 8069a790
"""
"""`turns_hash` of FastChat's questions, in the order of their numbers."""


def turns_hash(turns: Sequence[str]) -> str:
    """8 hex digits of the turns' text; how it is broken into lines and spaced does not matter."""
    text = "\x00".join(" ".join(turn.split()) for turn in turns)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


FASTCHAT_IDS: dict[str, int] = {digits: number for number, digits in enumerate(_HASHES.split(), start=81)}
"""`turns_hash` -> FastChat's `question_id`."""


def make(record: Mapping[str, Any], count_tokens: CountTokens) -> Parsed:
    turns, key = (
        (record["turns"], record.get("question_id"))
        if "turns" in record
        else (record.get("prompt"), record.get("prompt_id"))
    )
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise UserError(f"'turns' (or 'prompt') must be a list of texts, got {turns!r}")
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise UserError(f"'question_id' (or 'prompt_id') must be a number or a text, got {key!r}")
    key = FASTCHAT_IDS.get(turns_hash(turns), key)
    return Parsed(str(key), text_field(record, "category"), tuple(turns), (None,) * len(turns))


BENCHMARK = Benchmark(
    name="mt_bench",
    version="1",
    make=make,
    metric="rouge_l",
    reference="reference_output",
    max_new_tokens=256,
    schema='{"question_id": 81, "category": "writing", "turns": ["…", "…"]} or the same with "prompt_id" and '
    '"prompt"',
    hub={"path": "HuggingFaceH4/mt_bench_prompts"},
    splits={"test": "train"},
)
