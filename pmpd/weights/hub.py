"""Checkpoint folders by path or by Hugging Face id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pmpd.errors import UserError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONFIG_FILES = ("*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt")
"""Config, tokenizer and model code: everything but the weights."""


def local_folder(model_path: str | Path, name: str = "--model-path", revision: str | None = None) -> Path:
    """The checkpoint folder, or the JSON file that names several; a Hugging Face id that is neither, or a
    URI, is downloaded. ValueError where there is none, which calls the path by `name`: what the user gave it
    as. `revision`: branch, tag or commit of the id's repository; default its main branch."""
    if "://" in str(model_path):
        from pmpd.storage.copies import download_folder

        return download_folder(str(model_path), name)
    folder = Path(model_path)
    if folder.is_dir() or (folder.suffix.lower() in (".json", ".gguf") and folder.is_file()):
        return folder
    folder = download(str(model_path), [*CONFIG_FILES, "*.safetensors"], f"{name} {model_path}", revision)
    if not any(
        folder.glob("*.safetensors")
    ):  # an older repository; where there are both, pickles are not worth their bytes
        folder = download(str(model_path), ["pytorch_model*"], f"{name} {model_path}", revision)
    return folder


def download(model_id: str, patterns: Sequence[str], told: str, revision: str | None = None) -> Path:
    """The folder with the files of a Hugging Face repository that match. ValueError, beginning with `told`,
    where that can't be had."""
    if not _ID.fullmatch(model_id):
        raise UserError(f"{told}: no such folder; give a checkpoint folder or a Hugging Face id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(patterns)))
    except (
        Exception
    ) as error:  # the hub client has its own zoo of exceptions: no network, no such id, gated, …
        raise UserError(
            f"{told}: no such folder, and not to be had from the Hugging Face hub ({type(error).__name__}: "
            f"{error})"
        ) from error
