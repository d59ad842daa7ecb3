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
import shutil
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from pmpd.errors import UserError
from pmpd.weights.fingerprint import tensor_digests

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The first of them that is there holds the weights: transformers' own order."""

SIDE_SUFFIXES = frozenset({".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"})


class Checkpoint:
    """The tensors of one checkpoint folder.

    ValueError: no such folder, no config.json, no weights.
    """

    dequantized: ClassVar[bool] = False
    """Whether the tensors arrive dequantized, whatever the files and settings beside them say."""

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
        if (self.folder / "adapter_config.json").is_file():
            raise UserError(
                f"checkpoint {folder}: by its adapter_config.json an adapter (LoRA, for one) belongs to the "
                f"weights; merge it into them (merge_and_unload) and save the result"
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
            content = json.loads(path.read_text(encoding="utf-8"))
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
        except Exception as error:  # each config class checks its fields in a way of its own
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"checkpoint {self.folder}: its model is defined by code in the folder; read that code, "
                    f"then pass --trust-remote-code"
                ) from error
            raise UserError(
                f"checkpoint file {self.folder / 'config.json'} is not what transformers reads "
                f"({one_line(error)}); correct it, or copy it again"
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """UserError where the checkpoint has none that can be read."""
        try:
            return AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:  # the tokenizers library raises plain exceptions
            raise UserError(
                f"checkpoint {self.folder}: no usable tokenizer in it ({one_line(error)}); "
                f"copy the base model's tokenizer files there"
            ) from error

    @cached_property
    def _index(self) -> dict[str, Path]:
        """Tensor name -> file."""
        named = self.config_json.get(
            "transformers_weights"
        )  # a file of another name, by transformers' own key
        for pattern in (*((Path(named).name,) if isinstance(named, str) else ()), *_WEIGHT_FILES):
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

    def write_side_files(self, folder: Path) -> None:
        """Copies what belongs to the model beside config and weights (tokenizer, templates, code)."""
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix in SIDE_SUFFIXES and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)

    def fingerprint(self) -> str:
        """16 hex digits over what makes the model: config, end-of-sequence tokens, and name, shape, dtype and
        every byte of each tensor. Not the path, nor how tensors are spread over files."""
        digest = hashlib.sha256()
        config = {
            key: value
            for key, value in self.config_json.items()
            if key not in ("_name_or_path", "transformers_version")
        }
        if self.eos_token_id is not None:
            config["eos_token_id"] = self.eos_token_id
        digest.update(json.dumps(config, sort_keys=True).encode())
        tensors: dict[str, str] = {}
        for file in sorted(set(self._index.values())):
            tensors |= tensor_digests(
                file, [name for name, at in self._index.items() if at == file], self.tensor
            )
            self.release()  # its pages were all touched
        for name in sorted(tensors):
            digest.update(f"{name} {tensors[name]}".encode())
        return digest.hexdigest()[:16]


def one_line(error: Exception) -> str:
    """Class and text of another library's exception, for a message of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())


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
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"it holds {others[0]!r}, which is a {type(content[others[0]]).__name__} and no tensor; save the "
            f"model's state_dict() itself, with nothing around it"
        )
    return content
