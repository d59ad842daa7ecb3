"""Files, local or of any file system that pyarrow.fs knows, all or nothing."""

from __future__ import annotations

import contextlib
import os
import posixpath
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pmpd.errors import UserError

# ------------------------------------------------------------------------------------------------------------


def resolve(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """File system and path within it, of a local path or a URI."""
    text = str(path)
    if "://" not in text:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)).replace(os.sep, "/")
    try:
        return pafs.FileSystem.from_uri(text.rstrip("/"))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"path {text}: {error}; give a local path or a URI that pyarrow knows (s3://, gs://, abfs://, "
            f"hdfs://)"
        ) from error


def join(path: str | Path, *parts: str) -> str:
    return posixpath.join(str(path).rstrip("/"), *parts)


def absolute(path: str | Path) -> str:
    """The path with which every process of this machine means the same place."""
    return str(path) if "://" in str(path) else resolve(path)[1]


def exists(path: str | Path) -> bool:
    file_system, inner = resolve(path)
    return file_system.get_file_info(inner).type != pafs.FileType.NotFound


def write_bytes(path: str | Path, content: bytes | pa.Buffer) -> None:
    """All or nothing. Local: temporary name, fsync, rename. Object store: one put. ShardWriteError where it
    can't be written."""
    try:
        _write_bytes(path, content)
    except OSError as error:
        raise ShardWriteError(
            f"{path}: can't be written ({error}); everything finished before it is kept. Free space, make "
            f"the folder writable or choose "
            "another --output-dir, then run the same command again: it goes on where it stopped"
        ) from error


def _write_bytes(path: str | Path, content: bytes | pa.Buffer) -> None:
    file_system, inner = resolve(path)
    if not isinstance(file_system, pafs.LocalFileSystem):
        with file_system.open_output_stream(inner) as stream:
            stream.write(content)
        return
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(target.parent, os.O_RDONLY)  # the rename itself must survive a power cut too
    try:
        os.fsync(folder)
    except OSError:
        pass  # some network file systems can't sync a folder
    finally:
        os.close(folder)


def read_bytes(path: str | Path) -> bytes | None:
    """The content, or None where there is no such file. ValueError where a file is in the place of its
    folder."""
    file_system, inner = resolve(path)
    try:
        with file_system.open_input_stream(inner) as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UserError(
            f"{path}: a file is in the place of the folder; choose another --output-dir, or move that file "
            f"away"
        ) from error


def remove(path: str | Path) -> None:
    """Removes one file; fine if it is gone already."""
    file_system, inner = resolve(path)
    with contextlib.suppress(FileNotFoundError):
        file_system.delete_file(inner)


def list_files(folder: str, hidden: bool = False) -> list[str]:
    file_system, inner = resolve(folder)
    infos = file_system.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    names = [info.base_name for info in infos if info.type == pafs.FileType.File]
    return [join(folder, name) for name in names if hidden or not name.startswith((".", "_"))]


class ShardWriteError(OSError, UserError):
    """A shard or another file of a dataset could not be written (disk full, no permission): a ValueError for
    users, and an OSError for those who wait for it to pass."""

    def __reduce__(self) -> tuple[Any, ...]:  # carried from worker to driver
        return (ShardWriteError, self.args)
