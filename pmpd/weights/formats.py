"""Weight formats: which one a layer is stored in is read from what the checkpoint holds for that layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from pmpd.errors import UserError
from pmpd.weights import anyprec, dense, gptq
from pmpd.weights.base import PrecisionLinear, PrecisionState
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.mixed_linear import MixedLinear
from pmpd.weights.skeleton import build_skeleton, fill, replace_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pmpd.weights.naming import NamedTensors


class WeightFormat(ABC):
    """One way of storing quantized linears. A new one is a subclass and an entry in `FORMATS`."""

    reads_bias: ClassVar[bool] = True
    """Whether `layer` takes the bias too; else that stays a parameter of the model."""

    @abstractmethod
    def precisions(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        """Those that the folder holds, descending; None where it is of another format. UserError: settings
        that can't be read."""

    def check(self, checkpoint: Checkpoint, precisions: Sequence[int]) -> None:
        """UserError where the folder does not hold `precisions`, or holds something that can't be read."""
        held = self.precisions(checkpoint) or ()
        if absent := [bits for bits in precisions if bits not in held]:
            raise UserError(
                f"precisions {list(precisions)}: checkpoint {checkpoint.folder} holds "
                f"{', '.join(map(str, held))}, not {', '.join(map(str, absent))}; choose from these"
            )

    @abstractmethod
    def holds(self, names: Collection[str], layer: str) -> bool:
        """Whether the tensors `names` store the linear `layer` in this format."""

    @abstractmethod
    def layer(
        self,
        tensors: NamedTensors,
        name: str,
        linear: nn.Linear,
        precisions: Sequence[int],
        state: PrecisionState,
        dtype: torch.dtype,
        kernel: str | None,
    ) -> tuple[PrecisionLinear, list[str]]:
        """What stands in place of `linear`, and what is wrong with its tensors."""


class AnyPrecision(WeightFormat):
    def precisions(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        return anyprec.precisions_of(checkpoint) if "anyprec" in checkpoint.config_json else None

    def check(self, checkpoint: Checkpoint, precisions: Sequence[int]) -> None:
        anyprec.check(checkpoint, precisions)

    def holds(self, names: Collection[str], layer: str) -> bool:
        return any(f"{layer}.lut{bits}" in names for bits in range(1, 17))

    def layer(self, tensors, name, linear, precisions, state, dtype, kernel):
        parent = anyprec.precisions_of(tensors.checkpoint)[0]
        return anyprec.layer(tensors, parent, name, linear, precisions, state, dtype, kernel)


class GPTQ(WeightFormat):
    reads_bias = False

    def precisions(self, checkpoint: Checkpoint) -> tuple[int, ...] | None:
        settings = gptq.settings_of(checkpoint)
        return None if settings is None else (settings["bits"],)

    def holds(self, names: Collection[str], layer: str) -> bool:
        return any(f"{layer}.{part}" in names for part in ("qzeros", "scales"))

    def layer(self, tensors, name, linear, precisions, state, dtype, kernel):
        settings = gptq.settings_of(tensors.checkpoint)
        assert settings is not None  # `precisions` has read them
        return gptq.layer(tensors, settings, name, linear, state, dtype, kernel)


FORMATS: dict[str, WeightFormat] = {"anyprec": AnyPrecision(), "gptq": GPTQ()}


def format_of(checkpoint: Checkpoint) -> WeightFormat | None:
    """The format of a folder; None where its weights are unquantized. UserError: quantized in a way that no
    format knows."""
    if checkpoint.dequantized:
        return None
    entries = reversed(
        FORMATS.values()
    )  # the newest is asked first: an older one may refuse what it does not know
    return next((form for form in entries if form.precisions(checkpoint) is not None), None)


def precisions_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Of one folder, descending. UserError where it holds none but the unquantized weights."""
    form = format_of(checkpoint)
    return (form.precisions(checkpoint) if form else None) or anyprec.precisions_of(checkpoint)


def layer_of(
    form: WeightFormat,
    tensors: NamedTensors,
    name: str,
    linear: nn.Linear,
    precisions: Sequence[int],
    state: PrecisionState,
    dtype: torch.dtype,
    kernel: str | None,
) -> tuple[PrecisionLinear | None, list[str]]:
    """The quantized layer of a folder of `form`; None where the folder leaves it unquantized."""
    names = tensors.names()
    if form.holds(names, name):
        return form.layer(tensors, name, linear, precisions, state, dtype, kernel)
    return None, [f"{name} has a qweight of another format"] * (f"{name}.qweight" in names)


def check_unquantized(checkpoint: Checkpoint, name: str = "checkpoint") -> None:
    """UserError, which calls the checkpoint `name`, where it is a quantized one."""
    marks = [
        f"config.json has {key!r}"
        for key in ("anyprec", "quantization_config")
        if checkpoint.config_json.get(key)
    ]
    if checkpoint.dequantized:
        return
    settings = checkpoint.config_json.get("quantization_config")
    if isinstance(settings, dict) and (method := settings.get("quant_method")):
        marks = [f"config.json has 'quantization_config', by {method}"]
    if (checkpoint.folder / "quantize_config.json").is_file():
        marks.append("it has a quantize_config.json")
    if not marks:
        marks = [f"its format is {key!r}" for key, form in FORMATS.items() if form.precisions(checkpoint)]
    if marks:
        raise UserError(
            f"{name} {checkpoint.folder} is quantized already ({marks[0]}): give the unquantized model"
        )


def load(
    checkpoint: Checkpoint, precisions: Sequence[int] | None, dtype: torch.dtype, kernel: str | None = None
) -> tuple[PreTrainedModel, tuple[int, ...]]:
    """The model of one folder, and the precisions that its linears offer (`precisions`, or all that the
    folder holds; 16 for an unquantized one). Everything else exists once, as `dtype`, on the CPU.

    UserError naming tensors that are missing or misshapen, or precisions that the folder does not hold.
    """
    form = format_of(checkpoint)
    if form is None:
        if precisions is not None and list(precisions) != [dense.BITS]:
            anyprec.precisions_of(checkpoint)  # raises: says that the folder holds no precisions
        return dense.load(checkpoint, dtype), (dense.BITS,)
    loaded = tuple(sorted(precisions or form.precisions(checkpoint) or (), reverse=True))
    form.check(checkpoint, loaded)
    model, state = build_skeleton(checkpoint), PrecisionState()
    from pmpd.weights.naming import NamedTensors

    tensors, problems = NamedTensors(checkpoint, model), []
    state.set_uniform(loaded[0])

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        layer, wrong = layer_of(form, tensors, name, linear, loaded, state, dtype, kernel)
        problems.extend(wrong)
        if layer is None or form.reads_bias or linear.bias is None:
            return layer
        return MixedLinear(linear, dict.fromkeys(loaded, layer), state)

    replace_linears(model, make)
    if problems:
        raise UserError(
            f"checkpoint {checkpoint.folder} is damaged: {'; '.join(problems[:8])}"
            + (" …" if len(problems) > 8 else "")
        )
    fill(model, tensors, dtype)
    checkpoint.release()
    return model, loaded
