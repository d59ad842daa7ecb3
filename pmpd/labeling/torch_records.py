"""Records of a data set that was written with `torch.save`: prompts as token ids, with labels and KV features
where the file has them.

The published data sets of both stages are such files. Their layout is not documented; what is read here
follows their public description, in the shapes that `torch.save` of a data set usually has:

- a list of records: `[{"input_ids": …, "label": 2}, …]`, or of token ids alone;
- columns: `{"input_ids": [N, T] or N lists, "label": [N]}`, padding marked by `attention_mask`;
- a tensor [N, T] of token ids;
- any of these under one name (`WRAPPERS`), or records by id.

Only tensors, arrays and plain values are loaded (`weights_only=True`): loading such a file runs no code.

Legend: N records, T tokens, H kv heads, D head dim.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmpd import storage
from pmpd.errors import UserError
from pmpd.schedulers.chain import NUM_CLASSES

IDS = ("input_ids", "prompt_input_ids", "prompt_ids", "token_ids", "tokens", "ids")
"""What the token ids of a prompt may be called; the first name that a record has is taken, here and below."""
LABELS = ("label", "labels", "switch_class", "class", "target", "targets", "y")
KEYS = ("keys", "key_cache", "key_states", "key", "k")
VALUES = ("values", "value_cache", "value_states", "value", "v")
CACHES = ("past_key_values", "kv_cache", "kv_features", "kv", "features")
"""Keys and values together, of one layer or of all (the last one counts)."""
MASK = "attention_mask"
WRAPPERS = ("data", "dataset", "records", "examples", "samples", "prompts", "train")

_NO_LABEL = (None, -1, -100)
_PAIR = re.compile(r"\D*(\d+)\D+(\d+)\D*")
_PAIR_FIELD = re.compile(r"(?:labels?|class|targets?)[_-]\d+[_-]\d+")


def _numpy_globals() -> list[Any]:
    """What an array of numbers is pickled as, under the names of numpy 1 and 2."""
    array: Any = np.zeros(1).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    named = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for core in ("core", "_core")
        for function in (array, scalar)
    ]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [*named, np.ndarray, np.dtype, *kinds]


@dataclass(frozen=True)
class TorchRecords:
    """The records of a file."""

    path: str
    records: tuple[Mapping[str, Any], ...]
    flag: str = "--dataset"
    """What the user gave the path as; errors name it."""

    @classmethod
    def read(cls, path: str, flag: str = "--dataset") -> TorchRecords:
        """UserError, with the cure, where the file holds more than plain data, or no records."""
        return cls(path, tuple(_records(_load(path, flag), path, flag)), flag)

    def fingerprint(self) -> str:
        """First 16 hex digits of the file's SHA-256."""
        if storage.is_uri(self.path):
            return hashlib.sha256(storage.read_bytes(self.path) or b"").hexdigest()[:16]
        with Path(self.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    @property
    def name(self) -> str:
        """What stands for the file in a prompt's id."""
        return storage.base_name(storage.absolute(self.path))

    @property
    def told(self) -> str:
        """For people: how many records, and their fields."""
        return f"{len(self.records)} records with the fields {', '.join(map(str, self.records[0]))}"

    @property
    def has_ids(self) -> bool:
        return any(name in self.records[0] for name in IDS)

    def unused(self) -> list[str]:
        """Fields that nothing here reads."""
        known = {MASK, *IDS, *LABELS, *KEYS, *VALUES, *CACHES}
        return [str(name) for name in self.records[0] if name not in known and not _names_pair(name)]

    def require(self, what: str, names: Sequence[str], cure: str) -> None:
        """UserError where the first record has none of these fields."""
        if not any(name in self.records[0] for name in names):
            raise UserError(
                f"{self.flag} {self.path}: {self.told}; it needs {what}, called {', '.join(names)}; {cure}"
            )


# ---- layouts


def _load(path: str, flag: str) -> Any:
    content = storage.read_bytes(path) if storage.is_uri(path) else None
    if content is None and not storage.exists(path):
        raise UserError(f"{flag} {path}: no such file")
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            source = path if content is None else io.BytesIO(content)
            return torch.load(source, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        if kind is None:
            raise UserError(
                f"{flag} {path}: not a file that torch.save wrote, or a part of one "
                f"({type(error).__name__}); copy it again"
            ) from error
        raise UserError(
            f"{flag} {path}: it holds a {kind[1]}, which loading would run code for; it was not loaded. "
            f"Where you trust the file, save it again as plain records: rows = torch.load({path!r}, "
            f"weights_only=False); torch.save([dict(row) for row in rows], 'plain.pt')"
        ) from error


def _records(value: Any, path: str, flag: str) -> list[Mapping[str, Any]]:
    found = list(_split(value))
    if not found:
        held = f"a dict of {', '.join(map(str, value))}" if isinstance(value, Mapping) else _kind(value)
        raise UserError(
            f"{flag} {path}: it holds {held}, no records; give a list of records, each with the token ids of "
            f"a prompt ({', '.join(IDS)}), or a dict of such columns"
        )
    return found


def _split(value: Any) -> Iterator[Mapping[str, Any]]:
    """The records of a value in any of the layouts; none where it is in none of them."""
    if isinstance(value, Mapping):
        column = next(
            (value[name] for name in (*IDS, *KEYS, *LABELS) if _is_column(value.get(name))),
            None,
        )
        if column is not None:
            count = len(column)
            columns = {name: _cut(given, count) for name, given in value.items()}
            fields = {name: cut for name, cut in columns.items() if cut is not None}
            for index in range(count):
                yield {name: cut[index] for name, cut in fields.items()}
            return
        inside = next((value[name] for name in WRAPPERS if name in value), None)
        if inside is not None:
            yield from _split(inside)
        elif value and all(isinstance(record, Mapping) for record in value.values()):
            yield from value.values()
    elif isinstance(value, list | tuple):
        for record in value:
            yield record if isinstance(record, Mapping) else {IDS[0]: record}
    elif isinstance(value, Tensor | np.ndarray) and value.ndim == 2:
        for row in value:
            yield {IDS[0]: row}


def _is_column(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 0)


def _cut(column: Any, count: int) -> Sequence[Any] | None:
    """A column as one value a record; None where it is none (a number, a name, another length)."""
    if isinstance(column, Mapping):  # labels by pair
        inner = {name: _cut(part, count) for name, part in column.items()}
        if not inner or any(part is None for part in inner.values()):
            return None
        return [{name: part[i] for name, part in inner.items() if part is not None} for i in range(count)]
    return column if _is_column(column) and len(column) == count else None


def _kind(value: Any) -> str:
    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    empty = "an empty " if hasattr(value, "__len__") and len(value) == 0 else "a "
    return f"{empty}{type(value).__name__}{shape}"


# ---- one record


def _field(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _plain(value: Any) -> Any:
    """Tensors and arrays, also in lists, as lists of numbers."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _row(value: Any) -> list[Any] | None:
    """A list of numbers from [T] or [1, T]."""
    plain = _plain(value)
    while isinstance(plain, list) and len(plain) == 1 and isinstance(plain[0], list):
        plain = plain[0]
    return plain if isinstance(plain, list) else None


def _kept(record: Mapping[str, Any], length: int) -> list[int] | None:
    """Positions that the record's mask keeps; None where it has no mask of this length."""
    mask = _row(record.get(MASK))
    return [i for i, kept in enumerate(mask) if kept] if mask is not None and len(mask) == length else None


def token_ids(record: Mapping[str, Any]) -> list[int]:
    """The token ids of a record, padding left out. ValueError where it has none that are usable."""
    ids = _row(_field(record, IDS))
    if ids is None:
        raise ValueError(f"a record needs token ids, called {', '.join(IDS)}; it has {', '.join(record)}")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"token ids must be whole numbers, they are {ids!r:.60}")
    kept = _kept(record, len(ids))
    return ids if kept is None else [ids[i] for i in kept]


def labels_of(
    record: Mapping[str, Any], pairs: Sequence[tuple[int, int]] | None
) -> dict[tuple[int, int], int | None]:
    """(high, low) -> switch class 0..3, None where the record has none. A number is the label of the one
    pair, a list those of all `pairs` in order, a dict names them (`{"4,3": 2}`; fields `label_4_3` too).

    ValueError where they do not fit `pairs`, or are no classes. `pairs` None: the record must name them.
    """
    given = _field(record, LABELS)
    named = {_pair_of(name): record[name] for name in record if _names_pair(name)}
    if isinstance(given, Mapping):
        named |= {_pair_of(name): label for name, label in given.items()}
    if given is None and not named:
        raise ValueError(f"a record needs a label, called {', '.join(LABELS)}; it has {', '.join(record)}")
    if named:
        if None in named:
            raise ValueError(f"labels by pair are named like '4,3', these are {', '.join(map(str, given))}")
        found = {pair: _class_of(label) for pair, label in named.items() if pair is not None}
        missing = [pair for pair in pairs or () if pair not in found]
        if missing:
            raise ValueError(f"no label for the pair(s) {missing}; the record has {list(found)}")
        return {pair: found[pair] for pair in (pairs or found)}
    row = _plain(given)
    row = row if isinstance(row, list) else [row]
    if pairs is None or len(row) != len(pairs):
        told = "pairs that are not named" if pairs is None else f"the pairs {list(pairs)}"
        raise ValueError(
            f"{len(row)} label(s) a record for {told}; give --precisions of a chain of {len(row) + 1}"
        )
    return {pair: _class_of(label) for pair, label in zip(pairs, row, strict=True)}


def _pair_of(name: Any) -> tuple[int, int] | None:
    """(4, 3) from that tuple, "4,3", "4-3" or "label_4_3"."""
    if isinstance(name, str):
        found = _PAIR.fullmatch(name)
        name = (int(found[1]), int(found[2])) if found else None
    if isinstance(name, tuple) and len(name) == 2 and all(isinstance(bits, int) for bits in name):
        return name if name[0] > name[1] else None
    return None


def _names_pair(field: Any) -> bool:
    return isinstance(field, str) and _PAIR_FIELD.fullmatch(field) is not None


def _class_of(label: Any) -> int | None:
    plain = _row(label)
    number = plain[0] if plain is not None and len(plain) == 1 else _plain(label)
    if number in _NO_LABEL:
        return None
    if number not in range(NUM_CLASSES):
        raise ValueError(f"the label {number!r:.40} is no switch class, those are 0 to {NUM_CLASSES - 1}")
    return int(number)


@dataclass(frozen=True)
class KVFeatures:
    """Of one record: float16 [T, D] each, and H where the file had every head."""

    keys: np.ndarray
    values: np.ndarray
    heads: int | None


def features_of(record: Mapping[str, Any]) -> KVFeatures | None:
    """KV features of a record, averaged over the heads where it has every head ([H, T, D] or [1, H, T, D]);
    None where it has none. ValueError where they are unusable."""
    keys, values = _field(record, KEYS), _field(record, VALUES)
    if keys is None or values is None:
        keys, values = _last_layer(_field(record, CACHES))
    if keys is None or values is None:
        return None
    (keys, heads), (values, value_heads) = _averaged(keys), _averaged(values)
    if keys.shape != values.shape or heads != value_heads:
        raise ValueError(f"keys of shape {list(keys.shape)}, values of {list(values.shape)}")
    kept = _kept(record, len(keys))
    if kept is not None:
        keys, values = keys[kept], values[kept]
    if _field(record, IDS) is not None and len(token_ids(record)) != len(keys):
        raise ValueError(f"KV features of {len(keys)} tokens for a prompt of {len(token_ids(record))}")
    if len(keys) == 0 or not (torch.isfinite(keys).all() and torch.isfinite(values).all()):
        raise ValueError("KV features that are empty or not finite")
    return KVFeatures(keys.half().numpy(), values.half().numpy(), heads)


def _last_layer(cache: Any) -> tuple[Any, Any]:
    """(keys, values) of the last layer of a cache."""
    while isinstance(cache, list | tuple) and cache:
        if len(cache) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in cache):
            return cache[0], cache[1]
        cache = cache[-1]
    if isinstance(cache, Tensor | np.ndarray) and cache.ndim == 6:
        cache = cache[-1]
    if isinstance(cache, Tensor | np.ndarray) and cache.ndim >= 3 and len(cache) == 2:
        return cache[0], cache[1]
    return None, None


def _averaged(given: Any) -> tuple[Tensor, int | None]:
    """float32 [T, D], and H."""
    try:
        tensor = torch.as_tensor(given).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"KV features must be numbers ({error})") from error
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim == 2:
        return tensor, None
    if tensor.ndim != 3:
        raise ValueError(f"KV features are [T, D], [H, T, D] or [1, H, T, D], these {list(tensor.shape)}")
    return tensor.mean(0), len(tensor)
