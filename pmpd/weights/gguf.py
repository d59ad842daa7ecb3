"""GGUF files as unquantized checkpoints: transformers dequantizes them, and makes config and tokenizer of
their metadata. What they were quantized to before plays no part: the result counts as 16 bits."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from pmpd.errors import UserError
from pmpd.weights.checkpoint import Checkpoint, one_line
from pmpd.weights.fingerprint import tensor_digests


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that `path` is, or that a folder without a config.json holds; None where there is none.
    UserError: a folder with several."""
    path = Path(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"checkpoint {path}: it holds {names}; give the path of one of them")
    return files[0] if files else None


class GGUFCheckpoint(Checkpoint):
    """The tensors of one GGUF file, dequantized to float32 when the first one is asked for.

    UserError: the packages of `pmpd[gguf]` are missing, or transformers can't read the file.
    """

    dequantized = True

    def __init__(self, file: Path, trust_remote_code: bool = False) -> None:
        self.file = file
        self.folder = file.parent
        self.trust_remote_code = trust_remote_code

    def _from_file(self, kind: Any, **options: Any) -> Any:
        try:
            import accelerate  # noqa: F401 - transformers asks for it
            import gguf  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"{self.file}: reading GGUF needs the package {error.name}; pip install 'pmpd[gguf]'"
            ) from error
        try:
            return kind.from_pretrained(
                self.folder, gguf_file=self.file.name, local_files_only=True, **options
            )
        except Exception as error:  # a damaged file, an architecture it does not know, …
            raise UserError(
                f"{self.file}: transformers can't read this GGUF file ({one_line(error)}); "
                f"give another one, or the model in its original form"
            ) from error

    def config(self) -> PreTrainedConfig:
        config = self._from_file(AutoConfig)
        config.quantization_config = None  # of the file; its tensors arrive dequantized
        del config.quantization_config
        return config

    @cached_property
    def config_json(self) -> dict[str, Any]:
        config = self.config().to_dict()
        return {key: value for key, value in config.items() if key not in ("dtype", "quantization_config")}

    @cached_property
    def generation_json(self) -> dict[str, Any]:
        """What ends a sequence: the file has no generation config, but its tokenizer knows."""
        ends = self.config_json.get("eos_token_id")
        if ends is None:
            ends = self.tokenizer().eos_token_id
        return {} if ends is None else {"eos_token_id": ends}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._from_file(AutoTokenizer)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        model = self._from_file(AutoModelForCausalLM, dtype=torch.float32, **_dequantized())
        return model.state_dict()

    def names(self) -> set[str]:
        return set(self._tensors)

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UserError(f"{self.file}: tensor {name} is missing")
        return self._tensors[name]

    def release(self) -> None:
        """Nothing: they can't be had again without dequantizing everything."""

    def fingerprint(self) -> str:
        """16 hex digits over every byte of the file."""

        def read(_: str) -> Tensor:
            return torch.from_file(str(self.file), size=self.file.stat().st_size, dtype=torch.uint8)

        return tensor_digests(self.file, ["file"], read)["file"][:16]

    def write_side_files(self, folder: Path) -> None:
        self.tokenizer().save_pretrained(folder)
        if self.generation_json:
            (folder / "generation_config.json").write_text(json.dumps(self.generation_json) + "\n")


def _dequantized() -> dict[str, Any]:
    """The option that keeps transformers from leaving the weights in their blocks; {} before it could."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
