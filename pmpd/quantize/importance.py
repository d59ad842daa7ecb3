"""How much each weight matters: the squared gradient of the language-model loss, summed over calibration
samples.

That is the diagonal of the empirical Fisher information, the importance of SqueezeLLM (Kim et al., 2023,
arXiv:2306.07629) and Any-Precision LLM. Gradients of different samples must not be added before they are
squared, so samples run one at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def squared_gradients(
    model: PreTrainedModel,
    names: Sequence[str],
    samples_ST: Tensor,
    on_sample: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Parameter name -> float32 of its shape, on the model's device: Σ over samples of (∂ mean loss / ∂
    parameter)².

    Memory beside the model: one float32 per weight in `names`, and the activations of one sample. No gradient
    outlives its layer's step of the backward pass. ValueError: a loss that is not finite.
    """
    model.requires_grad_(False)
    totals, handles = {}, []
    for name in names:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(True)
        totals[name] = torch.zeros_like(parameter, dtype=torch.float32)
        handles.append(parameter.register_post_accumulate_grad_hook(_adder(totals[name])))
    try:
        for index, sample in enumerate(samples_ST):
            input_ids = sample.unsqueeze(0).to(model.device)
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss of calibration sample {index} is {loss.item()}: the unquantized model does "
                    f"not work on these texts"
                )
            loss.backward()
            on_sample()
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)
    return totals


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        total.addcmul_(gradient, gradient)
        parameter.grad = None

    return add
