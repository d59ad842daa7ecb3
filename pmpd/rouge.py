"""ROUGE-L F1 as `rouge_score` computes it without stemming, with a bit-parallel longest common subsequence.

Labeling scores several continuations a prompt, and `rouge_score`'s table of Python integers would take as long as decoding them on a
small model. The tokens are `rouge_score`'s own; only the length of the subsequence is ours. Tests hold both to equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.tokenizers import DefaultTokenizer

_TOKENIZER = DefaultTokenizer(use_stemmer=False)


def rouge_l(reference: str, prediction: str) -> float:
    """ROUGE-L F1 in 0..1 (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.1); 0 for an empty text."""
    target, predicted = _TOKENIZER.tokenize(reference), _TOKENIZER.tokenize(prediction)
    if not target or not predicted:
        return 0.0
    common = longest_common_subsequence(target, predicted)
    precision, recall = common / len(predicted), common / len(target)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Its length, with one big-integer step per item of `right` (Hyyrö, "Bit-Parallel LCS-length Computation Revisited", 2004)."""
    positions: dict[str, int] = {}
    for index, item in enumerate(left):
        positions[item] = positions.get(item, 0) | 1 << index
    everything = (1 << len(left)) - 1
    unmatched = everything
    for item in right:
        update = unmatched & positions.get(item, 0)
        unmatched = (unmatched + update | unmatched - update) & everything
    return len(left) - unmatched.bit_count()
