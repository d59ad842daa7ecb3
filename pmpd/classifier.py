"""The KV-cache classifier: from the last layer's keys and values after prefill to one of the four switch classes.

Legend: B rows, T prompt tokens (padded), D head dim, H kv heads (= groups = queries per group), K = 4 classes, J pairs.

A leaf: torch, safetensors and numpy only. An artefact is a folder with one `classifier_{high}_{low}.safetensors` per pair and a
`config.json` that says what they fit; a folder of published `classifier_{high}_{low}.pt` state dicts loads too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

NUM_CLASSES = 4
FRACTIONS = (0.0, 1 / 3, 2 / 3, 1.0)
"""Share of the decode forwards that run at the high precision, per class."""
ARTEFACT_VERSION = 1


def mask_of(lengths: Tensor, tokens: int) -> Tensor:
    """bool [B, T]: True where a token is part of the row. `lengths` int64 [B]."""
    return torch.arange(tokens, device=lengths.device)[None, :] < lengths[:, None]


class KVCacheClassifier(nn.Module):
    """Learned queries attend over the cached tokens; a two-layer head reads the result.

    H groups of H queries attend over T (scaled dot product, dropout on the weights); the attended values are averaged within each
    group, concatenated to H·D, layer-normed, Linear(H·D, H·D), ReLU, Linear(H·D, 4). Returns logits, never probabilities:
    a softmax before the cross-entropy would flatten its gradient.

    `generator`: draws the initial weights; None = the process-wide one, which other threads may be drawing from.
    """

    generator: torch.Generator | None = None
    """Draws the dropout."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or not 0 <= dropout < 1:
            raise ValueError(f"dim {dim}, num_heads {num_heads}, dropout {dropout}: dim and heads >= 1, 0 <= dropout < 1")
        self.dim = dim
        self.num_heads = num_heads
        self.dropout = dropout
        width = num_heads * dim
        self.queries = nn.Parameter(torch.empty(num_heads, num_heads, dim))
        nn.init.xavier_normal_(self.queries, generator=generator)
        self.norm = nn.LayerNorm(width)
        self.hidden = _linear(width, width, generator)
        self.head = _linear(width, NUM_CLASSES, generator)

    def forward(self, keys_BTD: Tensor, values_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Logits float32 [B, 4]. Tokens at or after `lengths_B` count for nothing."""
        batch, tokens, dim = keys_BTD.shape
        if dim != self.dim:
            raise ValueError(f"KV features of head dim {dim}: this classifier reads head dim {self.dim}; it belongs to another model")
        queries_QD = self.queries.reshape(-1, dim)
        scores_BQT = torch.matmul(queries_QD, keys_BTD.transpose(1, 2)) / math.sqrt(dim)
        scores_BQT = scores_BQT.masked_fill(~mask_of(lengths_B, tokens)[:, None, :], -math.inf)
        weights_BQT = scores_BQT.softmax(-1)
        if self.training and self.dropout > 0:
            kept = torch.empty_like(weights_BQT).bernoulli_(1 - self.dropout, generator=self.generator)
            weights_BQT = weights_BQT * kept.div_(1 - self.dropout)
        attended = torch.matmul(weights_BQT, values_BTD).view(batch, self.num_heads, self.num_heads, dim).mean(2)
        return self.head(F.relu(self.hidden(self.norm(attended.flatten(1)))))


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """`nn.Linear` with the initial weights it always has, drawn from `generator`."""
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
    nn.init.uniform_(linear.bias, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
    return linear


class MeanPooledClassifier(nn.Module):
    """The simple head every result is compared with: one linear layer on the mean key and the mean value."""

    def __init__(self, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * dim)
        self.head = _linear(2 * dim, NUM_CLASSES, generator)

    def forward(self, keys_BTD: Tensor, values_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Logits float32 [B, 4]."""
        mask_BT1 = mask_of(lengths_B, keys_BTD.shape[1])[:, :, None]
        pooled = (torch.cat([keys_BTD, values_BTD], dim=-1) * mask_BT1).sum(1) / lengths_B[:, None]
        return self.head(self.norm(pooled))


@dataclass(frozen=True)
class ArtefactConfig:
    """What the classifiers of a folder are and what they fit (`config.json`)."""

    dim: int
    num_heads: int
    pairs: tuple[tuple[int, int], ...]
    switch_fractions: tuple[float, ...] = FRACTIONS
    model_fingerprint: str | None = None
    """Fingerprint of the quantized model whose caches were labelled; None = not known (published state dicts)."""
    labels_fingerprint: str | None = None
    architecture: str = "kv_cache"
    version: int = ARTEFACT_VERSION
    training: dict[str, Any] = field(default_factory=dict)
    """The resolved training configuration, for the record."""


def classifier_file(pair: Sequence[int], suffix: str = "safetensors") -> str:
    return f"classifier_{pair[0]}_{pair[1]}.{suffix}"


def artefact_files(config: ArtefactConfig, states: Mapping[tuple[int, int], Mapping[str, Tensor]]) -> dict[str, bytes]:
    """File name → content of an artefact folder; `states` holds the `state_dict` of each pair's classifier."""
    files = {}
    for pair in config.pairs:
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in states[pair].items()}
        files[classifier_file(pair)] = save(tensors)
    files["config.json"] = (json.dumps(asdict(config), indent=2) + "\n").encode()
    return files


def save_artefact(folder: str | Path, config: ArtefactConfig, states: Mapping[tuple[int, int], Mapping[str, Tensor]]) -> None:
    """Write `artefact_files` into the local `folder`, `config.json` last: a folder without it is not finished."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in artefact_files(config, states).items():
        (folder / name).write_bytes(content)


@dataclass(frozen=True)
class Artefact:
    """Loaded classifiers, in the order of the pairs asked for, and what they fit."""

    config: ArtefactConfig
    classifiers: nn.ModuleList
    fingerprint: str
    """First 16 hex digits of the SHA-256 over the pairs' weights."""


def load_artefact(
    folder: str | Path,
    pairs: Sequence[tuple[int, int]],
    *,
    dim: int | None = None,
    num_heads: int | None = None,
    model_fingerprint: str | None = None,
) -> Artefact:
    """The classifiers of `pairs` from an artefact folder (or one with a `scheduler/` in it), or from published
    `classifier_{high}_{low}.pt` files.

    `dim`, `num_heads` and `model_fingerprint` describe the model they are to serve; None = not checked.
    Raises ValueError, with the reason, where the folder, a pair, a tensor or the model does not fit.
    """
    folder = Path(folder)
    if (folder / "scheduler" / "config.json").exists():
        folder = folder / "scheduler"
    if (folder / "config.json").exists():
        config = _read_config(folder)
        missing = [pair for pair in pairs if pair not in config.pairs]
        if missing:
            raise ValueError(
                f"{folder}: no classifier for the pair(s) {missing}; it holds {list(config.pairs)}; train it with --precisions of the chain"
            )
        states = {pair: load_file(folder / classifier_file(pair)) for pair in pairs}
    else:
        states = {pair: _read_published(folder, pair) for pair in pairs}
        heads, _, width = states[pairs[0]]["queries"].shape
        config = ArtefactConfig(dim=width, num_heads=heads, pairs=tuple(pairs))
    check_fit(config, str(folder), dim=dim, num_heads=num_heads, model_fingerprint=model_fingerprint)
    classifiers = nn.ModuleList()
    digest = hashlib.sha256()
    for pair in pairs:
        classifier = KVCacheClassifier(config.dim, config.num_heads, generator=torch.Generator())
        wanted = {name: tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in states[pair].items()}
        if wanted != found:
            raise ValueError(f"{folder}, pair {pair}: expected tensors {wanted}, found {found}")
        classifier.load_state_dict(states[pair])
        classifiers.append(classifier)
        for name in sorted(states[pair]):
            digest.update(name.encode() + states[pair][name].float().numpy().tobytes())
    return Artefact(config, classifiers.eval().requires_grad_(False), digest.hexdigest()[:16])


def check_fit(config: ArtefactConfig, source: str, *, dim: int | None, num_heads: int | None, model_fingerprint: str | None) -> None:
    """ValueError, with the reason, unless the artefact fits a model of this head dim, kv heads and fingerprint (None = any)."""
    for what, given, own in (("dim", dim, config.dim), ("num_heads", num_heads, config.num_heads)):
        if given is not None and given != own:
            raise ValueError(f"{what} {given}: the classifiers in {source} have {what} {own}; they were trained for another model")
    if None not in (model_fingerprint, config.model_fingerprint) and model_fingerprint != config.model_fingerprint:
        raise ValueError(
            f"{source}: trained on labels of the model {config.model_fingerprint}, this model is {model_fingerprint}; "
            "label and train with this model"
        )


def _read_config(folder: Path) -> ArtefactConfig:
    raw = json.loads((folder / "config.json").read_text())
    if raw.get("architecture") != "kv_cache" or raw.get("version") != ARTEFACT_VERSION:
        raise ValueError(
            f"{folder}/config.json: architecture {raw.get('architecture')!r} version {raw.get('version')!r}; "
            f"this version reads 'kv_cache' version {ARTEFACT_VERSION}"
        )
    raw["pairs"] = tuple((int(high), int(low)) for high, low in raw["pairs"])
    raw["switch_fractions"] = tuple(raw["switch_fractions"])
    return ArtefactConfig(**raw)


def _read_published(folder: Path, pair: tuple[int, int]) -> dict[str, Tensor]:
    path = folder / classifier_file(pair, "pt")
    if not path.exists():
        raise ValueError(
            f"{folder}: neither config.json nor {path.name}; give the folder that `jobs/train.py --output-dir` wrote (its scheduler/), "
            "or one of published classifier_{high}_{low}.pt files"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a plain state dict ({error}); save it again as `torch.save(classifier.state_dict(), path)`"
        ) from error
    return published_state(state, str(path))


def published_state(state: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """A published classifier's tensors under our names, recognised by shape and grouping, whatever they are called.

    Recognised: the one 3-D tensor [H, H, D] = the queries; among the groups that share a name up to its last dot, each a
    `weight` and a `bias`: the one with a 1-D weight [H·D] = layer norm, the one with [H·D, H·D] = hidden linear, the one with
    [4, H·D] = head. A prefix common to all (`module.`, `classifier.`) does not matter. Anything missing, twice or left over
    is a ValueError that lists the names and shapes found.
    """
    found: dict[str, Tensor] = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def refuse(why: str) -> ValueError:
        return ValueError(f"{source}: not a KV-cache classifier ({why}); found {shapes}")

    queries = [name for name, tensor in state.items() if tensor.ndim == 3]
    if len(queries) != 1 or shapes[queries[0]][0] != shapes[queries[0]][1]:
        raise refuse("expected one query tensor [heads, heads, dim]")
    found["queries"] = state[queries[0]]
    heads, _, dim = shapes[queries[0]]
    width = heads * dim
    roles = {(width,): "norm", (width, width): "hidden", (NUM_CLASSES, width): "head"}
    groups = {name.rpartition(".")[0] for name in state if name != queries[0]}
    for group in sorted(groups):
        names = {part: f"{group}.{part}" for part in ("weight", "bias")}
        if not all(name in state for name in names.values()):
            raise refuse(f"{group!r} has no weight and bias")
        role = roles.get(shapes[names["weight"]])
        if role is None or f"{role}.weight" in found:
            raise refuse(f"{group!r} has an unexpected shape")
        found |= {f"{role}.{part}": state[name] for part, name in names.items()}
    missing = {f"{role}.weight" for role in roles.values()} - set(found)
    if missing or len(found) != len(state):
        raise refuse(f"missing {sorted(missing)}" if missing else "tensors left over")
    return {name: tensor.float() for name, tensor in found.items()}
