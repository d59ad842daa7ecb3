"""Folders of a remote store on this machine, for what reads and writes local files only (checkpoints, a
report's page)."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
import uuid
from pathlib import Path

import pyarrow.fs as pafs

from pmpd.errors import UserError
from pmpd.storage.files import resolve, told, write_bytes
from pmpd.storage.uri import join, shown

_STATE = ".pmpd-copy.json"
"""In a copy: size and time of each file as it was in the store."""


def cache_folder(uri: str) -> Path:
    """Where the copy of a remote folder is kept on this machine (`$XDG_CACHE_HOME/pmpd`)."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "pmpd" / "copies" / hashlib.sha256(shown(uri).rstrip("/").encode()).hexdigest()[:16]


def download_folder(uri: str, name: str = "--model-path") -> Path:
    """A local copy of a remote folder; only files that changed since the last time are fetched. UserError,
    which calls the folder by `name`, where it holds nothing."""
    file_system, inner = resolve(uri)
    with told(uri):
        infos = file_system.get_file_info(pafs.FileSelector(inner, allow_not_found=True, recursive=True))
    files = {posixpath.relpath(info.path, inner): info for info in infos if info.type == pafs.FileType.File}
    if not files:
        raise UserError(f"{name} {shown(uri)}: nothing there; give a folder with a checkpoint in it")
    folder = cache_folder(uri)
    state_path = folder / _STATE
    state = json.loads(state_path.read_text()) if state_path.exists() else {}
    found = {path: [info.size, info.mtime_ns] for path, info in files.items()}
    for path, info in files.items():
        target = folder / path
        if not target.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{name} {shown(uri)}: a file of it is named {path!r}; no such name is copied")
        if state.get(path) == found[path] and target.exists() and target.stat().st_size == info.size:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        with told(uri), file_system.open_input_stream(info.path) as source, temporary.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 22)
        os.replace(temporary, target)
    for path in state.keys() - found.keys():
        (folder / path).unlink(missing_ok=True)
    write_bytes(str(state_path), json.dumps(found).encode())
    return folder


def upload_folder(folder: Path, uri: str) -> None:
    """Copies the files of a local folder, `config.json` and `manifest.json` last: who sees one of them sees
    all."""
    last = ("config.json", "manifest.json")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _STATE)
    for path in sorted(paths, key=lambda path: path.name in last):
        write_bytes(join(uri, path.relative_to(folder).as_posix()), path.read_bytes())
