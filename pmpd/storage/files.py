"""Files, local or of any file system that pyarrow.fs knows, all or nothing."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pmpd.errors import UserError
from pmpd.storage.multipart import abort_uploads
from pmpd.storage.uri import connected, is_uri, join, redacted, shown, split

_CURES = {
    "s3": "check the bucket's name, the region and endpoint (?region=…&endpoint_override=…&scheme=…) and the "
    "credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or the machine's role)",
    "gs": "check the bucket's name and the credentials (GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth "
    "application-default login`, or the machine's service account)",
    "gcs": "see gs://",
    "abfs": "write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER, and check the credentials "
    "(AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, `az login`, or the machine's identity)",
    "abfss": "see abfs://",
    "hdfs": "install Java and Hadoop's client, and set JAVA_HOME, HADOOP_HOME and CLASSPATH "
    "(`hadoop classpath --glob`)",
}
"""What to do where a store can't be used, by scheme."""

_DEFAULTS = {"s3": {"allow_delayed_open": "true"}, "gs": {"retry_limit_seconds": "60"}}
"""Settings of a driver that the URI may set otherwise. A delayed open writes a small file with one PUT;
Google's client would try again for 15 minutes."""


FILE_SYSTEMS: dict[str, Callable[[str], tuple[pafs.FileSystem, str]]] = {}
"""Scheme -> file system and path within it of a URI, for stores that pyarrow does not know. A program may add
some."""


def resolve(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """File system and path within it, of a local path or a URI. UserError where there is no such file system
    here."""
    text = connected(path)
    if not is_uri(text):
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)).replace(os.sep, "/")
    location, user, query = split(text)
    scheme = location.partition("://")[0]
    if scheme in FILE_SYSTEMS:
        return FILE_SYSTEMS[scheme](text)
    given = query.removeprefix("?")
    missing = [f"{k}={v}" for k, v in _DEFAULTS.get(scheme, {}).items() if f"{k}=" not in given]
    inner = f"{scheme}://{user}{location.partition('://')[2].rstrip('/')}"
    settings = "&".join(filter(None, [given, *missing]))
    try:
        return pafs.FileSystem.from_uri(f"{inner}?{settings}" if settings else inner)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreachable(path, error) from error


def unreachable(path: str | Path, error: BaseException) -> UserError:
    """What a user is told where a store can't be used: where, why in one line, and what to do."""
    where = shown(path)
    scheme = where.partition("://")[0]
    cure = _CURES.get(
        scheme, "give a local path or a URI that pyarrow knows (s3://, gs://, abfs://, hdfs://)"
    )
    if cure.startswith("see "):
        cure = _CURES[cure.removeprefix("see ").removesuffix("://")]
    why = redacted((str(error).strip() or type(error).__name__).splitlines()[0], path)
    return StorageError(f"path {where}: {why[:400]}; {cure}")


@contextlib.contextmanager
def told(path: str | Path) -> Iterator[None]:
    """Turns what a remote store's driver raises into a StorageError. A file that is not there stays a
    FileNotFoundError; a local path's errors stay as they are."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if isinstance(error, UserError) or not is_uri(path) or shown(path).startswith("file://"):
            raise
        raise unreachable(path, error) from error


class StorageError(OSError, UserError):
    """A store can't be reached or refuses: a UserError for people, an OSError for those who wait for it to
    pass."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), self.args)


def absolute(path: str | Path) -> str:
    """The path with which every process of this machine means the same place."""
    return str(path) if is_uri(path) else resolve(path)[1]


def exists(path: str | Path) -> bool:
    file_system, inner = resolve(path)
    with told(path):
        return file_system.get_file_info(inner).type != pafs.FileType.NotFound


def write_bytes(path: str | Path, content: bytes | pa.Buffer) -> None:
    """All or nothing. Local: temporary name, fsync, rename. Object store: one put. ShardWriteError where it
    can't be written."""
    try:
        _write_bytes(path, content)
    except StorageError:
        raise
    except OSError as error:
        raise ShardWriteError(
            f"{shown(path)}: can't be written ({redacted(str(error), path)}); everything finished "
            "before it is kept. Free space, make the folder writable or choose "
            "another --output-dir, then run the same command again: it goes on where it stopped"
        ) from error


def _write_bytes(path: str | Path, content: bytes | pa.Buffer) -> None:
    file_system, inner = resolve(path)
    if not isinstance(file_system, pafs.LocalFileSystem):
        renames = file_system.type_name == "hdfs"  # there a file is seen while it is written
        target_inner = f"{inner}.{uuid.uuid4().hex[:8]}.tmp" if renames else inner
        try:
            with file_system.open_output_stream(target_inner) as stream:
                stream.write(content)
        except OSError:
            abort_uploads(path)
            raise
        if renames:
            file_system.move(target_inner, inner)
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
        with told(path), file_system.open_input_stream(inner) as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UserError(
            f"{shown(path)}: a file is in the place of the folder; choose another --output-dir, or move that "
            f"file away"
        ) from error


def remove(path: str | Path) -> None:
    """Removes one file; fine if it is gone already."""
    file_system, inner = resolve(path)
    with contextlib.suppress(FileNotFoundError), told(path):
        file_system.delete_file(inner)


def list_files(folder: str, hidden: bool = False) -> list[str]:
    return [join(folder, info.base_name) for info in file_infos(folder, hidden)]


def file_infos(folder: str, hidden: bool = False) -> list[pafs.FileInfo]:
    """Name, size and time of the files in a folder; [] where there is none."""
    file_system, inner = resolve(folder)
    with told(folder):
        infos = file_system.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    return [
        info
        for info in infos
        if info.type == pafs.FileType.File and (hidden or not info.base_name.startswith((".", "_")))
    ]


class ShardWriteError(StorageError):
    """A shard or another file of a dataset could not be written (disk full, no permission): a ValueError for
    users, and an OSError for those who wait for it to pass."""

    def __reduce__(self) -> tuple[Any, ...]:  # carried from worker to driver
        return (ShardWriteError, self.args)
