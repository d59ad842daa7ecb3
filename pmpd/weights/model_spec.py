"""Which model, and how it is loaded: what a command's flags say, and all a worker needs to load it.

Importing this is cheap: a command line that only wants to know the flags waits for no torch, and a worker
sets its threads before anything starts some.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from pmpd.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from pmpd.weights.checkpoint import Checkpoint

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""What activations and unquantized weights are; auto: float32 on a CPU, float16 on a GPU."""

HeadBits = Literal[16, 8]
"""How many bits a weight of the head has; 8: for bfloat16 models on a CPU, 16-bit ones on a GPU."""


@dataclass(frozen=True)
class ModelSpec:
    """A model by its path, with all that decides how it is loaded. Opening and loading are left to whoever
    holds it, on whatever machine: it is small, picklable, and equal where its fields are."""

    path: str
    """A checkpoint folder, a JSON of one folder per precision, or a Hugging Face id."""
    multi_model: bool = False
    """The path must be such a JSON."""
    precisions: tuple[int, ...] | None = None
    """Those to load; None: all that the checkpoint holds."""
    kernel: str | None = None
    """Forces an implementation of the multiplication."""
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    """Runs model code that comes with the checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id's repository."""
    head_bits: HeadBits = 16
    flag: str = "--model-path"
    """What the user gave the path as; errors name it."""

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise UserError(f"--dtype {self.dtype}: choose one of {', '.join(get_args(Dtype))}")
        if self.head_bits not in get_args(HeadBits):
            raise UserError(f"--head-bits {self.head_bits}: a head has 16 bits or 8")
        if self.head_bits == 8:
            if self.dtype == "float32":
                raise UserError(
                    "--head-bits 8 with --dtype float32: a head of 8 bits is for bfloat16 models on a CPU, "
                    "for float16 and bfloat16 ones on a GPU; add --dtype bfloat16"
                )
            if self.kernel == "reference":
                raise UserError(
                    "--head-bits 8 with --kernel reference: a head of 8 bits goes with the kernels cpu, "
                    "triton, cuda and dense; leave --kernel out"
                )
        if os.path.exists(self.path):  # a worker's working directory may be another; an id stays as it is
            object.__setattr__(self, "path", os.path.abspath(self.path))

    def open(self) -> Checkpoint:
        """The checkpoint; a Hugging Face id is downloaded. UserError: there is none, or it is damaged."""
        from pmpd.weights.hub import local_folder
        from pmpd.weights.mixed import open_checkpoint

        folder = self.path if self.multi_model else local_folder(self.path, self.flag, self.revision)
        return open_checkpoint(folder, self.trust_remote_code, self.multi_model)

    def open_unquantized(self) -> Checkpoint:
        """As `open`. UserError where it is a quantized one."""
        from pmpd.weights.formats import check_unquantized

        checkpoint = self.open()
        check_unquantized(checkpoint, self.flag)
        return checkpoint

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        import torch

        from pmpd.weights.base import compute_dtype

        return compute_dtype(device) if self.dtype == "auto" else getattr(torch, self.dtype)


def check_held(checkpoint: Checkpoint, given: str, asked: dict[str, Sequence[int]]) -> None:
    """UserError, which calls the checkpoint `given`, for a precision that it does not hold, or where it is
    unquantized. `asked`: flag -> the precisions that it names."""
    from pmpd.weights.formats import format_of
    from pmpd.weights.mixed import MultiCheckpoint, precisions_of

    if not isinstance(checkpoint, MultiCheckpoint) and format_of(checkpoint) is None:
        raise UserError(
            f"--model-path {given}: an unquantized model; make a quantized one with `pmpd quantize "
            f"--model-path {given}` and give it here, this one as --reference-model-path"
        )
    held = precisions_of(checkpoint)
    for flag, widths in asked.items():
        absent = [bits for bits in widths if bits not in held]
        if absent:
            named, there, lacking = (", ".join(map(str, some)) for some in (widths, held, absent))
            raise UserError(f"{flag} {named}: {given} holds {there}, not {lacking}")


def shared_tokenizer(checkpoints: Sequence[Checkpoint]) -> PreTrainedTokenizerBase:
    """The tokenizer of checkpoints of one model, the first one's. UserError where they differ."""
    first, *others = (checkpoint.tokenizer() for checkpoint in checkpoints)
    for checkpoint, other in zip(checkpoints[1:], others, strict=True):
        if other.get_vocab() != first.get_vocab():
            raise UserError(
                f"{checkpoints[0].folder} and {checkpoint.folder} have different tokenizers; give two "
                f"checkpoints of one model"
            )
    return first
