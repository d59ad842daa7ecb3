"""The tensors of a checkpoint under the names that the model has for them, by transformers' own rules.

A file may be older than the model class that reads it: GPT-NeoX's head is `embed_out` in it, a model that
was saved without its head has no `model.` in front of its names, some layers are stored as one tensor and
computed as several. transformers knows how each architecture's files are named, and this module asks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from pmpd.errors import UserError
from pmpd.weights.checkpoint import Checkpoint, one_line


@dataclass
class _Conversion:
    """Tensors of the file from which transformers makes one or more of the model's."""

    converter: WeightConverter
    first_target: str
    parts: list[tuple[str, str]] = field(default_factory=list)
    """(the converter's pattern that matched, name in the file)"""


class NamedTensors:
    """The tensors of `checkpoint` by the names of `model`, whose parameters may be on the meta device. A
    tensor that belongs to a layer of the model without being one of its parameters (`…q_proj.qweight`) goes
    by that layer's name; what belongs to nothing in the model keeps its own."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint = checkpoint
        self._model = model
        self._expected = model.state_dict()
        conversions: list[WeightTransform] = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._sources: dict[str, str | _Conversion] = {}
        self.unknown: list[str] = []
        """Names in the file that belong to nothing in the model."""
        by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        for name in sorted(checkpoint.names(), key=dot_natural_key):
            target, pattern = self._target(name)
            if target in self._expected and pattern is not None:
                conversion = self._sources.get(target)
                if not isinstance(conversion, _Conversion):
                    conversion = _Conversion(by_pattern[pattern], target)
                    first = conversion.converter.target_patterns[0]
                    for other in conversion.converter.target_patterns:
                        self._sources[target.replace(first, other)] = conversion
                conversion.parts.append((pattern, name))
            elif target in self._expected:
                self._sources.setdefault(target, name)
            else:
                layer, _, part = name.rpartition(".")
                weight, pattern = self._target(f"{layer}.weight")
                if pattern is None and weight in self._expected:
                    self._sources.setdefault(f"{weight.removesuffix('weight')}{part}", name)
                else:
                    self._sources.setdefault(name, name)
                    self.unknown.append(name)

    def _target(self, name: str) -> tuple[str, str | None]:
        """The model's name, and the pattern of the converter that makes its tensor."""
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._expected)
        if target not in self._expected and name in self._expected:
            return rename_source_key(name, [], [], prefix, self._expected)
        return target, pattern

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    def names(self) -> set[str]:
        return set(self._sources)

    def tensor(self, name: str) -> Tensor:
        """UserError where the checkpoint has none of this name, or one that transformers can't convert."""
        source = self._sources.get(name, name)
        if isinstance(source, str):
            return self.checkpoint.tensor(source)
        converter = deepcopy(source.converter)
        for pattern, original in source.parts:
            tensor = self.checkpoint.tensor(original)
            # it takes tensors as well as futures of them
            converter.add_tensor(source.first_target, original, pattern, tensor)  # type: ignore[arg-type]
        try:
            made = converter.convert(source.first_target, model=self._model, config=self._model.config)[name]
        except Exception as error:
            files = ", ".join(original for _, original in source.parts)
            raise UserError(
                f"checkpoint {self.folder}: {name} can't be made of {files} ({one_line(error)}); "
                f"copy the weights again"
            ) from error
        return made[0] if isinstance(made, list) else made

    def release(self) -> None:
        self.checkpoint.release()


class FirstOf(NamedTensors):
    """The tensors of several checkpoints of `model`: of each the first one's that has it. Tied names are one
    tensor, so the first checkpoint that has any of them gives all."""

    def __init__(self, members: Sequence[NamedTensors], model: PreTrainedModel) -> None:
        self.members = members
        self._holders = {name: m for m in reversed(members) for name in m.names()}
        for pair in model.all_tied_weights_keys.items():
            first = next((m for m in members if not m.names().isdisjoint(pair)), None)
            for name in pair:
                self._holders.pop(name, None)
                if first is not None and name in first.names():
                    self._holders[name] = first

    @property
    def folder(self) -> Path:
        return self.members[0].folder

    def names(self) -> set[str]:
        return set(self._holders)

    def tensor(self, name: str) -> Tensor:
        return self._holders.get(name, self.members[0]).tensor(name)
