"""Checkpoint folders: reading tensors by name, building a model around them, and the fingerprint that names a
model.

A folder holds `config.json`, tokenizer files and weights as safetensors or as `pytorch_model.bin`, each
single or sharded with an index. Tensors are memory-mapped and read when asked for. A pickle is only ever read
with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pmpd.errors import UserError

_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class Checkpoint:
    """The tensors of one checkpoint folder.

    ValueError: no such folder, no config.json, no weights.
    """

    def __init__(self, folder: str | Path, trust_remote_code: bool = False) -> None:
        self.folder = Path(folder)
        self.trust_remote_code = trust_remote_code
        if not self.folder.is_dir():
            raise UserError(
                f"checkpoint {folder}: no such folder; give the folder that holds config.json and the weights"
            )
        if not (self.folder / "config.json").is_file():
            raise UserError(
                f"checkpoint {folder}: no config.json in it; give the folder that holds config.json and the "
                f"weights"
            )

    @cached_property
    def config_json(self) -> dict[str, Any]:
        return self.read_json("config.json")

    @cached_property
    def generation_json(self) -> dict[str, Any]:
        """The folder's `generation_config.json`, {} where it has none."""
        name = "generation_config.json"
        return self.read_json(name) if (self.folder / name).is_file() else {}

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """What ends a sequence: of generation_config.json, else of config.json."""
        ends = self.generation_json.get("eos_token_id")
        return self.config_json.get("eos_token_id") if ends is None else ends

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a file of the folder. ValueError where it holds none."""
        path = self.folder / name
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoint file {path} can't be read: {error}; copy it again from where the checkpoint is "
                f"from"
            ) from error
        if not isinstance(content, dict):
            raise UserError(
                f"checkpoint file {path} holds a {type(content).__name__}, not an object; copy it again"
            )
        return content

    def config(self) -> PreTrainedConfig:
        """The Hugging Face config object. `trust_remote_code` is off unless the caller switched it on."""
        self.config_json  # noqa: B018 - raises where it is damaged
        try:
            return AutoConfig.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"checkpoint {self.folder}: its model is defined by code in the folder; read that code, "
                    f"then pass --trust-remote-code"
                ) from error
            raise

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """UserError where the checkpoint has none that can be read."""
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"checkpoint {self.folder}: no usable tokenizer in it ({error}); copy the base model's "
                f"tokenizer files there"
            ) from error

    @cached_property
    def _index(self) -> dict[str, Path]:
        """Tensor name -> file."""
        for pattern in _WEIGHT_FILES:
            path = self.folder / pattern
            if not path.is_file():
                continue
            if pattern.endswith(".index.json"):
                weight_map = self.read_json(pattern).get("weight_map")
                if not isinstance(weight_map, dict):
                    raise UserError(
                        f"checkpoint file {path} has no weight_map (tensor name -> file); copy it again"
                    )
                missing = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
                if missing:
                    raise UserError(
                        f"checkpoint {self.folder}: {pattern} names files that are not there: "
                        f"{', '.join(missing)}"
                    )
                return {name: self.folder / file for name, file in weight_map.items()}
            return dict.fromkeys(self._open(path).keys(), path)
        shards = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("gptq_model*.bin"))
        if shards:
            return {name: shard for shard in shards for name in self._open(shard).keys()}  # noqa: SIM118 - a file, not a dict
        raise UserError(f"checkpoint {self.folder}: no weights in it; looked for {', '.join(_WEIGHT_FILES)}")

    @cached_property
    def _files(self) -> dict[Path, Any]:
        return {}

    def _open(self, path: Path) -> Any:
        """A dict-like of tensors: an open safetensors file, or the memory-mapped dict of a `.bin`."""
        if path not in self._files:
            try:
                if path.suffix == ".safetensors":
                    self._files[path] = safe_open(path, framework="pt", device="cpu")
                else:
                    self._files[path] = _load_pickle(path)
            except Exception as error:
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise UserError(f"checkpoint file {path} can't be read: {kind}{error}") from error
        return self._files[path]

    def names(self) -> set[str]:
        return set(self._index)

    def tensor(self, name: str) -> Tensor:
        """ValueError where the checkpoint has no such tensor."""
        if name not in self._index:
            raise UserError(f"checkpoint {self.folder}: tensor {name} is missing")
        file = self._open(self._index[name])
        try:
            return file[name] if isinstance(file, dict) else file.get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise UserError(
                f"checkpoint file {self._index[name]} does not hold {name}, as the index says ({error}); "
                f"copy index and shards again"
            ) from error

    def release(self) -> None:
        """Lets go of the open files, so that their pages stop counting as this process's memory; they are
        opened again when needed.

        A mapping goes with the last tensor that was read through it and is still alive.
        """
        self._files.clear()

    def fingerprint(self) -> str:
        """16 hex digits over what makes the model: config, end-of-sequence tokens, and name, shape, dtype and
        a sample of each tensor. Not the path."""
        digest = hashlib.sha256()
        config = {
            key: value
            for key, value in self.config_json.items()
            if key not in ("_name_or_path", "transformers_version")
        }
        if self.eos_token_id is not None:
            config["eos_token_id"] = self.eos_token_id
        digest.update(json.dumps(config, sort_keys=True).encode())
        file = None
        for name in sorted(self._index):
            if self._index[name] != file:
                self.release()  # a sample touches most pages of its file
                file = self._index[name]
            tensor = self.tensor(name)
            flat = tensor.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64].contiguous()
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
        self.release()
        return digest.hexdigest()[:16]


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin`, memory-mapped unless torch < 1.6 wrote it. ValueError where it holds anything
    else, code above all."""
    try:
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own advice is to trust the file
        raise UserError(
            "it holds more than tensors, and reading that would run its code; save the tensors as safetensors"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"it holds a {type(content).__name__}, not a dict of tensors; save the model's state_dict()"
        )
    return content


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules are built without memory for their parameters; buffers (rotary frequencies) are
    real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.data.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]  # mypy counts self twice
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of the checkpoint's config with all parameters on the meta device, in eval mode.

    ValueError naming a kind of model whose rows can't share a forward.
    """
    config = checkpoint.config()
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=checkpoint.trust_remote_code,
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        raise UserError(
            f"checkpoint {checkpoint.folder}: models of type {config.model_type!r} are not supported: {error}"
        ) from error
    problem = _unsupported(model)
    if problem:
        raise UserError(
            f"checkpoint {checkpoint.folder}: models of type {config.model_type!r} are not supported with "
            f"{problem}"
        )
    if checkpoint.generation_json:
        model.generation_config = GenerationConfig.from_dict(checkpoint.generation_json)
    return model.eval()


def _unsupported(model: PreTrainedModel) -> str | None:
    """What keeps rows of several positions from sharing a forward of this model; None for all else."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"chunked attention (attention_chunk_size {config.attention_chunk_size})"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for settings in (rope, *rope.values()):  # some have one per type of layer
        kind = settings.get("rope_type", settings.get("type")) if isinstance(settings, dict) else None
        if kind in ("dynamic", "longrope"):
            return f"rope type {kind!r}: its frequencies follow the longest row of the batch"
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others or model._is_stateful:
        return (
            f"layers other than full and sliding attention ({', '.join(sorted(others)) or 'recurrent ones'})"
        )
    own = type(model).__module__.startswith(
        "transformers."
    )  # code of a checkpoint is judged by what it does, in `slots`
    if own and not model._can_set_attn_implementation():
        return "attention of their own, past transformers' attention interface"
    return None


def replace_linears(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module | None]) -> None:
    """Puts `make(name, linear)` in the place of every `nn.Linear` for which it is not None."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            replacement = make(name, module)
            if replacement is not None:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, replacement)


def fill(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Gives every parameter that is still on the meta device its tensor from the checkpoint, floating ones as
    `dtype`.

    ValueError naming all tensors that are missing or of another shape.
    """
    problems, names = [], checkpoint.names()
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta or name not in names:
            continue
        tensor = checkpoint.tensor(name)
        if tensor.shape != parameter.shape:
            problems.append(
                f"{name} has shape {list(tensor.shape)}, the config asks for {list(parameter.shape)}"
            )
            continue
        module_name, _, attribute = name.rpartition(".")
        model.get_submodule(module_name)._parameters[attribute] = nn.Parameter(
            tensor.to(dtype) if tensor.is_floating_point() else tensor, requires_grad=False
        )
    for name, buffer in list(model.named_buffers()):
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if name in names and attribute not in module._non_persistent_buffers_set:
            stored = checkpoint.tensor(name)
            module._buffers[attribute] = stored.to(dtype) if buffer.is_floating_point() else stored
    model.tie_weights()
    problems += [
        f"{name} is missing"
        for name, parameter in model.named_parameters()
        if parameter.is_meta and name not in names
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"checkpoint {checkpoint.folder} does not fit its own config.json: {shown}")
