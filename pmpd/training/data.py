"""Labels and features of a labels table, and the split of its prompts.

Legend: N labelled prompts, T tokens, D head dim, J pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pmpd.errors import UserError
from pmpd.schedulers.chain import NUM_CLASSES, chain_of_pairs, pairs_of
from pmpd.training.config import SPLITS, TrainConfig

NO_LABEL = -1


# ---- Data
# ------------------------------------------------------------------------------------------------------------


def splits_of(ids: Sequence[str], config: TrainConfig) -> np.ndarray:
    """Index into SPLITS of each prompt, int64 [N]: from (seed, prompt_id) and the shares alone."""
    draws = [
        int.from_bytes(hashlib.sha256(f"split/{config.seed}/{key}".encode()).digest()[:8], "big") / 2**64
        for key in ids
    ]
    return np.searchsorted(np.cumsum(config.split_shares)[:-1], np.asarray(draws), side="right")


@dataclass(frozen=True)
class Labels:
    """Ids and labels of all usable rows, ordered by id: what the plan of the training is made from."""

    ids: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    labels: np.ndarray
    """int64 [N, J], NO_LABEL where a row has none for a pair."""
    losses: np.ndarray | None = None
    """float32 [N, J, 4], nats: what each class loses by a teacher-forced rule; None: labels of another."""

    def fingerprint(self, objective: str = "class") -> str:
        """First 16 hex digits of the SHA-256 over ids, pairs and labels (for the objective "loss" the losses
        too): the same for the same labels in any order or sharding."""
        lines = [
            f"{key} {' '.join(map(str, row))}"
            for key, row in zip(self.ids, self.labels.tolist(), strict=True)
        ]
        if objective == "loss" and self.losses is not None:
            lines += [row.astype("<f4").tobytes().hex() for row in self.losses]
        return hashlib.sha256("\n".join([str(self.pairs), *lines]).encode()).hexdigest()[:16]

    def within(self, pairs: Sequence[tuple[int, int]]) -> Labels:
        """Of these pairs only, which classifiers are to be for. UserError where one is not in the labels."""
        if missing := [pair for pair in pairs if pair not in self.pairs]:
            raise UserError(
                f"--precisions: no label of the pair {in_words(missing)}, these are of "
                f"{in_words(self.pairs)}; classifiers take a chain of labelled pairs: give one, or label "
                f"with its --precisions"
            )
        places = [self.pairs.index(pair) for pair in pairs]
        losses = None if self.losses is None else self.losses[:, places]
        return replace(self, pairs=tuple(pairs), labels=self.labels[:, places], losses=losses)

    def splits(self, config: TrainConfig) -> np.ndarray:
        """Index into SPLITS per row, int64 [N]."""
        return splits_of(self.ids, config)

    def rows(self, pair: int, config: TrainConfig) -> dict[str, np.ndarray]:
        """Split → rows that have a label for the pair at this position. ValueError where there is nothing to
        train or to validate on."""
        splits = self.splits(config)
        labelled = self.labels[:, pair] != NO_LABEL
        rows = {name: np.nonzero((splits == i) & labelled)[0] for i, name in enumerate(SPLITS)}
        for name in ("train", "validation"):
            if len(rows[name]) == 0:
                high, low = self.pairs[pair]
                raise UserError(
                    f"pair {high}-{low}: its {labelled.sum()} labelled prompts leave the {name} split empty; "
                    "label more prompts (some hundreds at least)"
                )
        return rows


def in_words(pairs: Sequence[tuple[int, int]]) -> str:
    """Pairs in words: 4-3, 3-2."""
    return ", ".join(f"{high}-{low}" for high, low in pairs)


def chain_in_words(pairs: Sequence[tuple[int, int]]) -> str:
    """The chain of these pairs: 4,3,2; the pairs in words where they are none."""
    chain = chain_of_pairs(pairs)
    return ",".join(map(str, chain)) if pairs_of(chain) == list(pairs) else f"the pairs {in_words(pairs)}"


def check_same_pairs(tables: Mapping[str, pa.Table]) -> None:
    """UserError where labels tables, by what they are called, are of several precision chains."""
    held = {}
    for name, table in tables.items():
        rows = usable(table)["pairs"].to_pylist()
        if pairs := sorted({(int(pair["high"]), int(pair["low"])) for row in rows for pair in row})[::-1]:
            held[name] = pairs
    if len({tuple(pairs) for pairs in held.values()}) > 1:
        lines = [f"{name} of {chain_in_words(pairs)}" for name, pairs in held.items()]
        raise UserError(
            f"labels of several precision chains: {'; '.join(lines)}; train on those of one, or label all "
            f"with the same `pmpd label --precisions`"
        )


def usable(table: pa.Table) -> pa.Table:
    """The rows of a labels table that have no error and features."""
    keep = pc.is_valid(table["pairs"])
    if "error" in table.column_names:
        keep = pc.and_(keep, pc.is_null(table["error"]))
    return table.filter(keep)


def labels_from_table(table: pa.Table, pairs: Sequence[tuple[int, int]] | None = None) -> Labels:
    """Ids and labels from a labels table (columns prompt_id, pairs, error). `pairs`: those wanted, None = all
    that occur.

    UserError where no row is usable, a prompt occurs twice, a pair is not in the table, or a label is no
    class.
    """
    table = usable(table).sort_by("prompt_id")
    ids = tuple(table["prompt_id"].to_pylist())
    if len(set(ids)) != len(ids):
        raise UserError(
            "labels: a prompt_id occurs twice; each prompt may have one row (the same prompts in two of the "
            "datasets given, or two label runs with other settings in one folder?)"
        )
    rows = [{(int(p["high"]), int(p["low"])): p["label"] for p in row} for row in table["pairs"].to_pylist()]
    held = sorted({pair for row in rows for pair in row}, reverse=True)
    if not held:
        raise UserError(
            "labels: no usable row, all have an error or no label; `pmpd inspect` shows the errors, `pmpd "
            "label` makes labels"
        )
    strange = sorted(
        {
            label
            for row in rows
            for label in row.values()
            if label is not None and not 0 <= label < NUM_CLASSES
        }
    )
    if strange:
        raise UserError(
            f"labels: {strange} are no classes, those are 0 to {NUM_CLASSES - 1}; label these prompts again"
        )
    values = [[NO_LABEL if row.get(pair) is None else row[pair] for pair in held] for row in rows]
    found = Labels(ids, tuple(held), np.asarray(values, dtype=np.int64), _losses(table, held))
    return found if pairs is None else found.within(pairs)


def _losses(table: pa.Table, wanted: Sequence[tuple[int, int]]) -> np.ndarray | None:
    """Losses of the classes, float32 [N, J, 4], of labels by a teacher-forced rule (it decodes nothing, so
    its rows have scores and no ROUGE-L); None for others."""
    rows = [{(int(p["high"]), int(p["low"])): p for p in row} for row in table["pairs"].to_pylist()]
    scores = []
    for row in rows:
        for pair in wanted:
            held = row.get(pair) or {}
            if None in (held.get("scores") or [None]) or held.get("high_rouge_l") is not None:
                return None
            scores.append(held["scores"])
    return -np.asarray(scores, dtype=np.float32).reshape(len(rows), len(wanted), NUM_CLASSES)


@dataclass(frozen=True)
class Features:
    """Ragged KV features of some rows, one after the other, on the CPU."""

    ids: tuple[str, ...]
    keys: Tensor
    """float16 [sum T, D]"""
    values: Tensor
    """float16 [sum T, D]"""
    lengths: Tensor
    """int64 [rows]"""

    @property
    def dim(self) -> int:
        return self.keys.shape[1]

    def batch(
        self, rows: Sequence[int] | np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values float32 [B, T, D], zero-padded on the right, and lengths int64 [B], of the rows at
        these positions."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        starts, lengths = (torch.cumsum(self.lengths, 0) - self.lengths)[index], self.lengths[index]
        offsets = torch.arange(int(lengths.max()))[None, :]
        valid = offsets < lengths[:, None]
        flat = torch.where(valid, starts[:, None] + offsets, 0)
        keys, values = (
            torch.where(valid[:, :, None], tensor[flat].float(), 0.0) for tensor in (self.keys, self.values)
        )
        return keys.to(device), values.to(device), lengths.to(device)


def features_from_table(table: pa.Table) -> Features:
    """KV features of the usable rows of a labels table, in its order. Exact: the stored float16 as they
    are."""
    table = usable(table)
    columns, lengths = [], []
    for name in ("keys", "values"):
        column = table[name].combine_chunks()
        column = (
            column
            if isinstance(column, pa.ListArray | pa.LargeListArray)
            else pa.concat_arrays(column.chunks)
        )
        dim = column.type.value_type.list_size
        flat = column.flatten().flatten().to_numpy(zero_copy_only=False)
        columns.append(torch.from_numpy(np.array(flat).reshape(-1, dim)))
        lengths.append(pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64))
    if not np.array_equal(lengths[0], lengths[1]) or (lengths[0] < 1).any():
        raise UserError(
            "labels: keys and values of a row have different or zero lengths; label these prompts again"
        )
    return Features(
        tuple(table["prompt_id"].to_pylist()), columns[0], columns[1], torch.from_numpy(lengths[0].copy())
    )


def join_features(parts: Sequence[Features]) -> Features:
    """Several parts as one, ordered by id."""
    ids = [key for part in parts for key in part.ids]
    order = np.argsort(np.asarray(ids))
    rows = [
        part_rows
        for part in parts
        for part_rows in zip(
            part.keys.split(part.lengths.tolist()), part.values.split(part.lengths.tolist()), strict=True
        )
    ]
    return Features(
        tuple(ids[i] for i in order),
        torch.cat([rows[i][0] for i in order]),
        torch.cat([rows[i][1] for i in order]),
        torch.cat([part.lengths for part in parts])[torch.from_numpy(order)],
    )
