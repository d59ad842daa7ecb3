"""Opening Parquet and Arrow files of unknown origin.

pyarrow builds the extension types that a file names while it opens it, and some of those that other
libraries register run code then (`ray.data.arrow_pickled_object` unpickles). No table of this project has
one, so a file with any is refused from its footer, before pyarrow sees it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pmpd.errors import UserError
from pmpd.storage.files import resolve, told
from pmpd.storage.uri import is_uri, shown

_SCHEMA_KEY, _EXTENSION_KEY = b"ARROW:schema", b"ARROW:extension:name"
_TAIL_BYTES = 1 << 16
_WHOLE_BYTES = 8 << 20
"""Files of a store up to this size are read with one request."""


class ForeignTypeError(UserError):
    """A table with a type that this project does not write."""


@contextlib.contextmanager
def open_parquet(path: str | Path) -> Iterator[pq.ParquetFile]:
    """One Parquet file, its checksums verified as it is read. ForeignTypeError where it has an extension
    type; pyarrow's errors where it is damaged; StorageError where a store can't be read."""
    file_system, inner = resolve(path)
    remote = is_uri(path)
    with contextlib.ExitStack() as stack:
        with told(path):
            file: pa.NativeFile = stack.enter_context(file_system.open_input_file(inner))
            if remote and file.size() <= _WHOLE_BYTES:
                file = pa.BufferReader(file.read())
            parquet = stack.enter_context(parquet_of(file, path))
        with _told_where_the_store_fails(path) if remote else contextlib.nullcontext():
            yield parquet


def parquet_of(file: pa.NativeFile, path: str | Path) -> pq.ParquetFile:
    """The Parquet in an open file, called by `path`. ForeignTypeError where it has an extension type."""
    _refuse_extensions(_footer(file, file.size()), path)
    file.seek(0)
    return pq.ParquetFile(file, page_checksum_verification=True)


@contextlib.contextmanager
def _told_where_the_store_fails(path: str | Path) -> Iterator[None]:
    """Damage and a store that fails both come as an OSError of pyarrow: it is the store where the plain bytes
    can't be read either."""
    try:
        yield
    except OSError:
        file_system, inner = resolve(path)
        with told(path), file_system.open_input_stream(inner) as stream:
            while stream.read(1 << 24):
                pass
        raise


def _footer(file: pa.NativeFile, size: int) -> bytes:
    """The serialized metadata at the end of the file; empty where there is none (pyarrow then says why)."""
    length = min(size, _TAIL_BYTES)
    file.seek(size - length)
    tail = file.read(length)
    if len(tail) < 8 or tail[-4:] not in (b"PAR1", b"PARE"):
        return b""
    if tail[-4:] == b"PARE":
        return tail  # encrypted: refused below
    wanted = struct.unpack("<I", tail[-8:-4])[0] + 8
    if wanted > size:
        return b""
    if wanted > length:
        file.seek(size - wanted)
        tail = file.read(wanted)
    return tail[-wanted:]


def batches_of(file: pa.NativeFile, path: str | Path) -> Iterator[tuple[pa.Schema, pa.RecordBatch | None]]:
    """(schema, record batch) of an open Arrow stream or file; the first time with None for the batch.
    ForeignTypeError where it has an extension type, pyarrow's errors where it is damaged."""
    begin = file.read(8)
    file.seek(0)
    if begin.startswith(b"ARROW1"):
        size = file.size()
        file.seek(max(0, size - 10))
        length = int.from_bytes(file.read(4), "little", signed=True)
        if 0 < length <= size - 10:
            file.seek(size - 10 - length)
            _refuse_names(file.read(length), path)
        file.seek(0)
        reader = pa.ipc.open_file(file)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        _refuse_names(pa.ipc.read_message(file).metadata.to_pybytes(), path)
        file.seek(0)
        reader = pa.ipc.open_stream(file)
        batches = iter(reader)
    yield reader.schema, None
    for batch in batches:
        yield reader.schema, batch


def _refuse_names(schema: bytes, path: str | Path) -> None:
    if _EXTENSION_KEY in schema:
        names = ", ".join(extension_names(schema)) or "one without a readable name"
        raise ForeignTypeError(
            f"table {shown(path)}: it uses the extension type(s) {names}; reading these can run code of "
            f"whoever wrote the file, so only plain columns are read: write it again with those"
        )


def _refuse_extensions(footer: bytes, path: str | Path) -> None:
    """The names lie in the Arrow schema (base64) that follows the key `ARROW:schema`. Arrow finds that key
    only where it lies in the footer as it is, so every place where it does is looked at."""
    if footer[-4:] == b"PARE":
        raise ForeignTypeError(f"table {shown(path)}: it is encrypted; give one that is not")
    start = footer.find(_SCHEMA_KEY)
    while start >= 0:
        schema = _value_behind(footer, start + len(_SCHEMA_KEY))
        if schema is None:
            raise ForeignTypeError(
                f"table {shown(path)}: its Arrow schema is not where a Parquet writer puts it; write it again"
            )
        _refuse_names(schema, path)
        start = footer.find(_SCHEMA_KEY, start + 1)


def _value_behind(footer: bytes, at: int) -> bytes | None:
    """The value of Thrift's `KeyValue{1: key, 2: value}` behind its key; None where there is none."""
    if footer[at : at + 1] != b"\x18":  # the next field, a string
        return None
    length, shift = 0, 0
    at += 1
    while at < len(footer) and shift < 35:
        byte = footer[at]
        length |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            break
    try:
        return base64.b64decode(footer[at : at + length], validate=True)
    except (binascii.Error, ValueError):
        return None


def extension_names(schema: bytes) -> list[str]:
    """The extension types that a serialized Arrow schema names: the strings that lie, in its flatbuffer, in
    the same key-value pair as `ARROW:extension:name`. For people: what is refused does not hang on it."""
    names = set()
    for at in range(0, len(schema) - 3, 4):
        if _string_at(schema, at) != _EXTENSION_KEY:
            continue
        for other in (at - 4, at + 4):  # key and value are neighbours in the pair's table
            name = _string_at(schema, other)
            if name and name.isascii() and name.decode().isprintable():
                names.add(name.decode())
    return sorted(names - {_EXTENSION_KEY.decode()})


def _string_at(buffer: bytes, at: int) -> bytes | None:
    """The string that the offset at this place of a flatbuffer points to."""
    if not 0 <= at <= len(buffer) - 4:
        return None
    start = at + struct.unpack_from("<I", buffer, at)[0]
    if start > len(buffer) - 4:
        return None
    length = struct.unpack_from("<I", buffer, start)[0]
    return buffer[start + 4 : start + 4 + length] if 0 < length < 200 else None


def check_tables(paths: list[str]) -> None:
    """ForeignTypeError where one of the files has an extension type: for readers that open them by path."""
    for path in paths:
        with open_parquet(path):
            pass
