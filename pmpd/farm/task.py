"""What a task has to say, and the units of items that its workers do. Imports no Ray."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from pmpd import storage
from pmpd.decode.pulse import Pulse

Item = dict[str, dict[str, Any]]
"""Input name -> the item's row of that input."""


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    worker: str
    """Its name in the `worker` column: node/process, with the GPU ids if it has any."""
    threads: int
    gpu_ids: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return "cuda" if self.gpu_ids else "cpu"


@dataclass(frozen=True)
class LateRow:
    """A row for which a worker's device has nothing more to do: the next unit has its turn meanwhile."""

    key: str
    """The item's id."""
    row: Callable[[], dict[str, Any]]
    """Waits for it. An exception is charged to it."""


@dataclass(frozen=True)
class BuiltTask:
    """A task with its model loaded, inside a worker."""

    run: Callable[[list[Item]], Iterable[dict[str, Any] | LateRow]]
    """Rows for a unit of items, in any order. An exception is charged to the one row that raises it (the
    others are done again)."""
    schema: pa.Schema
    models: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprints: part of what defines the rows, so they must be equal on all workers and in a continued
    run."""
    device: str = ""
    tokens: Callable[[dict[str, Any]], int] = lambda row: 0
    """New tokens of a row."""
    pulse: Pulse = field(default_factory=Pulse)
    """Counts the model's forwards while `run` is at work. A task whose rows take minutes must have one that
    beats: it is how a worker that hangs is told from one that works."""
    note: str = ""
    """Of how it was built: told once a run."""
    offers: Callable[[Callable[[], list[Item]]], None] | None = None
    """Is given, once, what to ask for items of the unit after this one while the last rows of this one leave
    room: `run` may begin with them, and has their rows ready when it is called for that unit. They come
    once."""


class FarmTask(ABC):
    """A picklable recipe for the work. `build` is called once per worker."""

    table: ClassVar[str]
    """Name of the output table."""
    id_column: ClassVar[str] = "prompt_id"
    """The item's id, in the inputs and in the output."""
    one_row_per_item: ClassVar[bool] = True
    """False: an item may give several rows, all in one shard (the turns of a conversation)."""
    row_group_rows: ClassVar[int | None] = None
    """Of the shards: what is read at least where single rows of them are asked for."""

    @property
    def most_forwards(self) -> float | None:
        """Forwards of one item, at most: what the time left is reckoned from until the first item is done.
        None: not known."""
        return None

    @property
    def recorded(self) -> Mapping[str, Any]:
        """What the manifest says under `run` beside workers and batch size: nothing that defines the rows."""
        return {}

    @abstractmethod
    def build(self, place: Place) -> BuiltTask:
        """Loads what the work needs. A ValueError stops the run with its message."""


@dataclass(frozen=True)
class Unit:
    """Items done together by one worker, and written as one shard."""

    ids: tuple[str, ...]
    rows: Mapping[str, tuple[tuple[str, int], ...]]
    """Input name -> (shard, row) per id."""
    kills: tuple[str, ...] = ()
    """Ids of the nodes on which it ended its worker process."""
    node_losses: int = 0
    stalls: int = 0
    failures: int = 0
    split: bool = False
    """A single row of a unit that was suspected."""
    failed: str | None = None
    """Set: no work, only error rows with this text."""

    @property
    def name(self) -> str:
        return hashlib.sha256("/".join(sorted(self.ids)).encode()).hexdigest()[:16]

    @property
    def suspected(self) -> bool:
        """Whether it has ended or stopped a worker, or is a row of one that has."""
        return bool(self.kills or self.stalls or self.split) and not self.failed

    def singles(self) -> list[Unit]:
        return [
            Unit((key,), {name: (at[i],) for name, at in self.rows.items()}, split=True)
            for i, key in enumerate(self.ids)
        ]


@dataclass(frozen=True)
class UnitResult:
    items: int
    error_items: int
    tokens: int
    seconds: float
    forwards: Mapping[int, int] = field(default_factory=dict)
    """Precision -> forwards of rows."""
    entry: storage.Entry | None = None
    """The unit's shard, for the index."""


@dataclass(frozen=True)
class WorkerInfo:
    place: Place
    models: Mapping[str, Any]
    device: str
    seconds: float = 0.0
    """Time it took to start."""
    note: str = ""


@dataclass(frozen=True)
class Beat:
    """What a worker has done of the unit it is at."""

    unit: str
    rows: int
    forwards: int
    longest_seconds: float
    """The longest step so far, of all units."""
    doing: str = ""
    """`Pulse.doing`."""


def shard_path(dataset: str, unit: Unit) -> str:
    return storage.join(storage.data_folder(dataset), f"part-{unit.name}.parquet")


def note_path(dataset: str, unit: Unit) -> str:
    """Where a worker that must end itself says why; temporary, as half-written files are."""
    return storage.join(dataset, f".death.{unit.name}.tmp")
