"""One model whose precisions come from different checkpoints: GPTQ folders, Any-Precision ones, an
unquantized one for 16 bits.

The JSON maps precision -> folder, and `model_path` -> the base model (config, tokenizer); relative folders
are relative to the JSON. The module tree, embeddings, norms, head, biases and whatever is not quantized exist
once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pmpd.errors import UserError
from pmpd.weights import dense, formats
from pmpd.weights.base import PrecisionLinear, PrecisionState
from pmpd.weights.checkpoint import Checkpoint
from pmpd.weights.gguf import GGUFCheckpoint, gguf_file
from pmpd.weights.hub import CONFIG_FILES, download
from pmpd.weights.mixed_linear import MixedLinear
from pmpd.weights.skeleton import build_skeleton, fill, replace_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pmpd.weights.naming import NamedTensors

Layer = Callable[[str, nn.Linear], tuple[PrecisionLinear | None, list[str]]]
"""(name, linear) -> its quantized layer without bias (None where the checkpoint leaves it unquantized), and
what is wrong with it."""


class MultiCheckpoint(Checkpoint):
    """The checkpoints of one JSON, seen as one: config of the base model; tensors of the base model where its
    weights are there, else of the highest precision that has them.

    ValueError: no such file, not of that form, a folder that is not there.
    """

    def __init__(self, file: str | Path, trust_remote_code: bool = False) -> None:
        self.file = Path(file)
        try:
            entries = json.loads(self.file.read_text(encoding="utf-8"))
            base = entries.pop("model_path")
            paths = {int(bits): path for bits, path in entries.items()}
            if not all(isinstance(path, str) for path in (base, *paths.values())):
                raise TypeError("a folder is a string")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{file}: {type(error).__name__}: {error}; without Any-Precision, the model path is a JSON "
                f"file like "
                '{"4": "model-gptq-4bit", "3": "model-gptq-3bit", "model_path": "model"}, one folder for '
                "each precision and the base model"
            ) from error
        if not paths:
            raise UserError(f'{file}: no precision in it; add a folder for each, like "4": "model-gptq-4bit"')
        folder = self._folder(base, CONFIG_FILES)
        super().__init__(folder, trust_remote_code)
        folders = {
            bits: self._folder(path, [*CONFIG_FILES, "*.safetensors", "*.bin"])
            for bits, path in paths.items()
        }
        unique = {path: Checkpoint(path, trust_remote_code) for path in folders.values()}
        self.members = {bits: unique[folders[bits]] for bits in sorted(folders, reverse=True)}
        self.holders = list(dict.fromkeys(self.members.values()))
        local = (
            self.file.parent / base
        ).is_dir()  # of a base model on the hub only the config is taken, whatever else was downloaded
        if (
            folder not in unique
            and local
            and any(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
        ):
            self.holders.insert(0, Checkpoint(folder, trust_remote_code))
        elif folder in unique:
            self.holders.sort(key=lambda holder: holder is not unique[folder])

    @property
    def precisions(self) -> tuple[int, ...]:
        """Descending."""
        return tuple(self.members)

    def _folder(self, path: str, hub_files: Sequence[str]) -> Path:
        folder = self.file.parent / path
        return (
            folder.resolve()
            if folder.is_dir()
            else download(path, hub_files, f"{self.file} (folders are relative to it): {path}")
        )

    def names(self) -> set[str]:
        return {name for holder in self.holders for name in holder.names()}

    def tensor(self, name: str) -> Tensor:
        """Of the first holder. ValueError where none has it."""
        return next((holder for holder in self.holders if name in holder.names()), self.holders[0]).tensor(
            name
        )

    def fingerprint(self) -> str:
        """16 hex digits over the members' fingerprints and precisions, that of the base model where its
        tensors are used, and its end-of-sequence tokens."""
        prints = [f"{bits} {member.fingerprint()}" for bits, member in self.members.items()]
        prints += [holder.fingerprint() for holder in self.holders if holder not in self.members.values()]
        return hashlib.sha256(
            json.dumps([self.config_json.get("model_type"), self.eos_token_id, *prints]).encode()
        ).hexdigest()[:16]


def open_checkpoint(path: str | Path, trust_remote_code: bool = False, multi: bool = False) -> Checkpoint:
    """A folder, or a JSON file that names one for each precision (`multi`: it must be that)."""
    if multi or Path(path).suffix == ".json":
        return MultiCheckpoint(path, trust_remote_code)
    file = gguf_file(path)
    return Checkpoint(path, trust_remote_code) if file is None else GGUFCheckpoint(file, trust_remote_code)


def precisions_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Descending. ValueError where the checkpoint holds none but the unquantized weights."""
    if isinstance(checkpoint, MultiCheckpoint):
        return checkpoint.precisions
    return formats.precisions_of(checkpoint)


def load(
    checkpoint: MultiCheckpoint, precisions: Sequence[int], dtype: torch.dtype, kernel: str | None = None
) -> PreTrainedModel:
    """The model with `MixedLinear`s that offer `precisions`; everything else exists once, as `dtype`, on the
    CPU.

    ValueError: precisions that the JSON does not hold, tensors that are missing or misshapen, tensors that
    exist once and on which the checkpoints disagree.
    """
    absent = [bits for bits in precisions if bits not in checkpoint.members]
    if absent:
        held = ", ".join(map(str, checkpoint.precisions))
        raise UserError(
            f"precisions {list(precisions)}: {checkpoint.file} holds {held}; add a folder for "
            f"{', '.join(map(str, absent))}"
        )
    state = PrecisionState()
    problems: list[str] = []
    state.set_uniform(max(precisions))
    model = build_skeleton(checkpoint)
    from pmpd.weights.naming import FirstOf, NamedTensors

    named = {holder: NamedTensors(holder, model) for holder in checkpoint.holders}
    members = {bits: named[checkpoint.members[bits]] for bits in sorted(precisions, reverse=True)}
    layers = {
        member: _layers_of(
            member, [bits for bits in members if members[bits] is member], state, dtype, kernel
        )
        for member in dict.fromkeys(members.values())
    }

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        parts = {}
        bare = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        for member, layer_of in layers.items():
            parts[member], wrong = layer_of(name, bare)
            if parts[member] is None and linear is not head and f"{name}.weight" not in member.names():
                wrong = [f"{name} has neither qweight nor weight"]
            if (
                linear.bias is None
                and f"{name}.bias" in member.names()
                and member.tensor(f"{name}.bias").any()
            ):
                wrong = [*wrong, f"{name}.bias is not zero, and the base model has no bias there"]
            problems.extend(f"{member.folder}: {problem}" for problem in wrong)
        if all(part is None for part in parts.values()):
            return None  # unquantized in all of them
        return MixedLinear(linear, {bits: parts[member] for bits, member in members.items()}, state)

    head = model.get_output_embeddings()  # has no tensor of its own where it is tied to the embedding
    replace_linears(model, make)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"checkpoints of {checkpoint.file} do not fit the base model: {'; '.join(problems[:8])}{more}"
        )
    fill(model, FirstOf(list(named.values()), model), dtype)
    unused = {named[member] for member in checkpoint.members.values()} - set(members.values())
    _check_shared(model, checkpoint, list(named.values()), unused)
    return model


def _layers_of(
    member: NamedTensors, precisions: list[int], state: PrecisionState, dtype: torch.dtype, kernel: str | None
) -> Layer:
    """How `member` gives the layers of its `precisions`. UserError where it does not hold them."""
    form = formats.format_of(member.checkpoint)
    if form is None and precisions != [dense.BITS]:
        raise UserError(
            f"checkpoint {member.folder} is not quantized (no quantize_config.json), and stands for "
            f"precision {precisions}"
        )
    if form is not None:
        held = form.precisions(member.checkpoint) or ()
        if len(held) == 1 and precisions != list(held):
            raise UserError(
                f"checkpoint {member.folder} holds {held[0]} bits, and stands for precision {precisions}"
            )
        form.check(member.checkpoint, precisions)

    def layer(name: str, linear: nn.Linear) -> tuple[PrecisionLinear | None, list[str]]:
        if form is None:
            return None, []
        return formats.layer_of(form, member, name, linear, precisions, state, dtype, kernel)

    return layer


def _check_shared(
    model: nn.Module,
    checkpoint: MultiCheckpoint,
    holders: Sequence[NamedTensors],
    unused: Collection[NamedTensors],
) -> None:
    """ValueError naming the tensors that exist once in `model`, under all names they have, and of which a
    checkpoint that is used holds others than the one they are from."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names_of.setdefault(id(tensor), []).append(name)
    problems = []
    for names in names_of.values():
        found = [(holder, name) for holder in holders for name in names if name in holder.names()]
        if len(found) < 2:
            continue
        (first, first_name), *others = found
        others = [(holder, name) for holder, name in others if holder not in unused]
        truth = first.tensor(first_name)
        problems += [
            f"{name} ({first.folder} and {holder.folder})"
            for holder, name in others
            if not _agree(truth, holder.tensor(name))
        ]
    if problems:
        raise UserError(
            f"checkpoints of {checkpoint.file} disagree on tensors that exist once: {'; '.join(problems[:8])}"
            + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            + "; make all of them from the same base model"
        )


def _agree(one: Tensor, other: Tensor) -> bool:
    """Equal, or one is the other rounded to its dtype (a bfloat16 model quantized as float16)."""
    if one.shape != other.shape:
        return False
    return (
        torch.equal(one, other)
        if one.dtype == other.dtype
        else torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)
    )
