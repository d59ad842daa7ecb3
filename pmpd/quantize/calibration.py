"""Pieces of text that a model is run on while it is quantized."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pmpd.errors import UserError

_TEXTS_PER_SAMPLE = 64
"""At most so many texts are read per sample, so that a streamed dataset ends."""


def calibration_samples(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int
) -> Tensor:
    """int64 [S, T], T ≤ `length` and S ≤ `samples`: the texts, shuffled, end to end with end-of-sequence
    between, cut into pieces.

    Fewer than asked where the texts end before; ValueError where there are not two tokens.
    """
    chosen = list(islice(texts, samples * _TEXTS_PER_SAMPLE))
    random.Random(seed).shuffle(chosen)
    stream: list[int] = []
    for text in chosen:
        stream.extend(
            tokenizer(text, verbose=False)["input_ids"]
        )  # not verbose: texts may be longer than the model
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        if len(stream) >= samples * length:
            break
    if len(stream) < 2:
        raise UserError(
            f"{len(chosen)} calibration texts hold {len(stream)} tokens: give texts of at least two, or "
            f"switch weighting off"
        )
    length = min(length, len(stream))
    count = min(samples, len(stream) // length)
    return torch.tensor(stream[: count * length]).view(count, length)
