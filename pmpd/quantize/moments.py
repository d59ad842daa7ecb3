"""What the linear layers see: the second moments H = Σ x xᵀ of their inputs over calibration texts.

‖(W − Ŵ) X‖² = Σ over rows r of (w_r − ŵ_r)ᵀ H (w_r − ŵ_r), so H is all that the error of a layer's output
depends on (GPTQ, Frantar et al., 2023, arXiv:2210.17323). Linears that read the same tensor share one H.

Legend: S samples, T tokens, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmpd import gpu
from pmpd.errors import UserError

NORM_LIMIT = 8.0
"""A token's input is scaled down to this many times the median norm of its sample: the few tokens with
massive activations (Sun et al., 2024, arXiv:2402.17762) would hide all others in a sum of squares."""


@dataclass
class InputMoments:
    """`sums` key -> float32 [K, K]; `key_of` linear -> key (the first linear that read that input); `samples`
    counted in so far."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    key_of: dict[str, str] = field(default_factory=dict)
    samples: int = 0

    def of(self, linear: str) -> Tensor:
        return self.sums[self.key_of[linear]]


class _LastLayerDone(Exception):
    """Leaves a forward whose rest nobody needs."""


@torch.no_grad()
def add_input_moments(
    model: PreTrainedModel,
    names: Sequence[str],
    samples_ST: Tensor,
    moments: InputMoments,
    on_sample: Callable[[], None] = lambda: None,
) -> None:
    """Adds the inputs of the linears `names` over samples `moments.samples`.. of `samples_ST` int64 [S, T].

    The forward ends behind the last linear of `names`. Memory beside the model: one float32 [K, K] per
    distinct input, and the activations of one sample. UserError: an input that is not finite.
    """
    names = list(names)
    last_input: list[Tensor | None] = [None]
    last_key = [""]
    left: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            if x is not last_input[0]:
                last_input[0], last_key[0] = x, name
                if name not in moments.sums:
                    moments.sums[name] = torch.zeros(
                        x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device
                    )
                moments.sums[name] += _second_moment(x.reshape(-1, x.shape[-1]), name)
            moments.key_of.setdefault(name, last_key[0])
            left.discard(name)
            if not left:
                raise _LastLayerDone

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        for sample in samples_ST[moments.samples :]:
            left.update(names)
            with suppress(_LastLayerDone):
                model(input_ids=sample.unsqueeze(0).to(model.device), use_cache=False)
            last_input[0] = None
            moments.samples += 1
            on_sample()
    finally:
        for handle in handles:
            handle.remove()


def _second_moment(x_TK: Tensor, name: str) -> Tensor:
    """float32 [K, K]: Σ x xᵀ with tokens beyond `NORM_LIMIT` medians scaled down to it.

    Inputs of 16 bits are multiplied as TF32 on a GPU: exactly, but for the few tokens that were scaled.
    """
    x = x_TK.float()
    norms = x.norm(dim=1)
    if not torch.isfinite(norms).all():
        raise UserError(
            f"the input of {name} is not finite on a calibration text: the unquantized model does not work "
            f"on these texts"
        )
    limit = NORM_LIMIT * norms.median()
    x = x * (limit / norms.clamp(min=1e-30)).clamp(max=1.0).unsqueeze(1)
    with gpu.tensor_float32() if x_TK.itemsize == 2 else nullcontext():
        return x.T @ x
