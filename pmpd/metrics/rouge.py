"""ROUGE-L F1 as `rouge_score` computes it without stemming, with a bit-parallel longest common subsequence.

Labeling scores several continuations a prompt, and `rouge_score`'s table of Python integers would take as
long as decoding them on a small model. The tokens are `rouge_score`'s own; only the length of the subsequence
is ours. A test holds both to equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from rouge_score.tokenizers import DefaultTokenizer

_TOKENIZERS = {stemmed: DefaultTokenizer(use_stemmer=stemmed) for stemmed in (False, True)}


def rouge_l(prediction: str, reference: str, stemmed: bool = False) -> float:
    """ROUGE-L F1 in 0..1 (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.1),
    of words or of their Porter stems; 0 for an empty text."""
    predicted, target = _words(prediction, stemmed), _words(reference, stemmed)
    if not predicted or not target:
        return 0.0
    common = longest_common_subsequence(target, predicted)
    precision, recall = common / len(predicted), common / len(target)
    return 2 * precision * recall / (precision + recall) if common else 0.0


@lru_cache(maxsize=10_000)
def _words(text: str, stemmed: bool) -> tuple[str, ...]:
    return tuple(_TOKENIZERS[stemmed].tokenize(text))


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Its length, with one big-integer step per item of `right` (Hyyrö, "Bit-Parallel LCS-length Computation
    Revisited", 2004)."""
    positions: dict[str, int] = {}
    for index, item in enumerate(left):
        positions[item] = positions.get(item, 0) | 1 << index
    everything = (1 << len(left)) - 1
    unmatched = everything
    for item in right:
        update = unmatched & positions.get(item, 0)
        unmatched = (unmatched + update | unmatched - update) & everything
    return len(left) - unmatched.bit_count()
