"""Files of a trained KV-cache scheduler: safetensors and config.json, or the published .pt files."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pmpd.errors import UserError
from pmpd.schedulers.chain import FRACTIONS, NUM_CLASSES
from pmpd.schedulers.classifier import KVCacheClassifier

ARTEFACT_VERSION = 1


@dataclass(frozen=True)
class ArtefactConfig:
    """What the classifiers of a folder are and what they fit (`config.json`)."""

    dim: int
    num_heads: int
    pairs: tuple[tuple[int, int], ...]
    switch_fractions: tuple[float, ...] = FRACTIONS
    model_fingerprint: str | None = None
    """Fingerprint of the quantized model whose caches were labelled; None = not known (published state
    dicts)."""
    labels_fingerprint: str | None = None
    outputs: str = "logits"
    """What the four outputs of a classifier are: logits of the classes, or negative losses in nats."""
    architecture: str = "kv_cache"
    version: int = ARTEFACT_VERSION
    budget: dict[str, Any] | None = None
    """Calibration for a number of bits on average (`schedulers.budget.Calibration`); None = made without
    one."""
    training: dict[str, Any] = field(default_factory=dict)
    """The resolved training configuration, for the record."""


def classifier_file(pair: Sequence[int], suffix: str = "safetensors") -> str:
    return f"classifier_{pair[0]}_{pair[1]}.{suffix}"


def artefact_files(
    config: ArtefactConfig, states: Mapping[tuple[int, int], Mapping[str, Tensor]]
) -> dict[str, bytes]:
    """File name → content of an artefact folder; `states` holds the `state_dict` of each pair's
    classifier."""
    files = {}
    for pair in config.pairs:
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in states[pair].items()}
        files[classifier_file(pair)] = save(tensors)
    files["config.json"] = (json.dumps(asdict(config), indent=2) + "\n").encode()
    return files


def save_artefact(
    folder: str | Path, config: ArtefactConfig, states: Mapping[tuple[int, int], Mapping[str, Tensor]]
) -> None:
    """Write `artefact_files` into the local `folder`, `config.json` last: a folder without it is not
    finished."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(
        missing_ok=True
    )  # of an earlier artefact, which the new weights do not belong to
    for name, content in artefact_files(config, states).items():
        (folder / name).write_bytes(content)


@dataclass(frozen=True)
class Artefact:
    """Loaded classifiers, in the order of the pairs asked for, and what they fit."""

    config: ArtefactConfig
    classifiers: nn.ModuleList
    fingerprint: str
    """First 16 hex digits of the SHA-256 over the pairs' weights."""


def read_local(path: str) -> bytes | None:
    """The content of a local file, None where there is none."""
    return Path(path).read_bytes() if Path(path).is_file() else None


def reader(folder: str) -> Callable[[str], bytes | None]:
    """What reads the files of `folder`. Local ones need no pyarrow, which is only there where tables are."""
    if "://" not in folder:
        return read_local
    from pmpd.storage.files import read_bytes

    return read_bytes


def locate(folder: str | Path, read: Callable[[str], bytes | None]) -> tuple[str, bytes | None]:
    """An artefact's own folder (`folder`, or the `scheduler/` in it) and its config.json, None where there is
    none."""
    folder = str(folder).rstrip("/")
    content = read(f"{folder}/scheduler/config.json")
    return (folder, read(f"{folder}/config.json")) if content is None else (f"{folder}/scheduler", content)


def architecture(folder: str | Path) -> str | None:
    """What kind of artefact a folder says it holds; None where it does not say."""
    _, content = locate(folder, reader(str(folder)))
    try:
        return None if content is None else json.loads(content).get("architecture")
    except (ValueError, AttributeError):
        return None


def load_artefact(
    folder: str | Path,
    pairs: Sequence[tuple[int, int]],
    *,
    dim: int | None = None,
    num_heads: int | None = None,
    model_fingerprint: str | None = None,
    read: Callable[[str], bytes | None] = read_local,
) -> Artefact:
    """The classifiers of `pairs` from an artefact folder (or one with a `scheduler/` in it), or from
    published `classifier_{high}_{low}.pt` files.

    `dim`, `num_heads` and `model_fingerprint` describe the model they are to serve; None = not checked.
    `read`: content of a file of the folder, None where it is missing; another one than the default also reads
    URIs. Raises ValueError, with the reason, where the folder, a file, a pair, a tensor or the model does not
    fit.
    """
    folder, content = locate(folder, read)
    if content is not None:
        config = _config(content, f"{folder}/config.json")
        missing = [pair for pair in pairs if pair not in config.pairs]
        if missing:
            raise UserError(
                f"{folder}: no classifier for the pair(s) {missing}; it holds {list(config.pairs)}; train it "
                f"with --precisions of the chain"
            )
        states = {pair: _read_weights(read, folder, pair) for pair in pairs}
    else:
        states = {pair: _read_published(read, folder, pair) for pair in pairs}
        heads, _, width = states[pairs[0]]["queries"].shape
        config = ArtefactConfig(dim=width, num_heads=heads, pairs=tuple(pairs))
    check_fit(config, folder, dim=dim, num_heads=num_heads, model_fingerprint=model_fingerprint)
    classifiers = nn.ModuleList()
    digest = hashlib.sha256()
    for pair in pairs:
        classifier = KVCacheClassifier(config.dim, config.num_heads, generator=torch.Generator())
        wanted = {name: tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in states[pair].items()}
        if wanted != found:
            raise UserError(f"{folder}, pair {pair}: expected tensors {wanted}, found {found}")
        classifier.load_state_dict(states[pair])
        classifiers.append(classifier)
        for name in sorted(states[pair]):
            digest.update(name.encode() + states[pair][name].float().numpy().tobytes())
    return Artefact(config, classifiers.eval().requires_grad_(False), digest.hexdigest()[:16])


def check_fit(
    config: ArtefactConfig,
    source: str,
    *,
    dim: int | None,
    num_heads: int | None,
    model_fingerprint: str | None,
) -> None:
    """ValueError, with the reason, unless the artefact fits a model of this head dim, kv heads and
    fingerprint (None = any)."""
    for what, given, own in (("dim", dim, config.dim), ("num_heads", num_heads, config.num_heads)):
        if given is not None and given != own:
            raise UserError(
                f"{what} {given}: the classifiers in {source} have {what} {own}; they were trained for "
                f"another model"
            )
    check_fingerprint(config.model_fingerprint, source, model_fingerprint)


def check_fingerprint(own: str | None, source: str, model_fingerprint: str | None) -> None:
    """ValueError where the artefact was trained on labels of another model (None: not known)."""
    if None not in (model_fingerprint, own) and model_fingerprint != own:
        raise UserError(
            f"{source}: trained on labels of the model {own}, this model is {model_fingerprint}; "
            "label and train with this model"
        )


def _config(content: bytes, source: str) -> ArtefactConfig:
    try:
        raw = json.loads(content)
        described = {key: raw.get(key) for key in ("architecture", "version")}
        if described["architecture"] == "regression":
            raise UserError("it describes a regression; use --schedulers regression")
        if described != {"architecture": "kv_cache", "version": ARTEFACT_VERSION}:
            raise UserError(
                f"it describes {described}, this version reads 'kv_cache' version {ARTEFACT_VERSION}"
            )
        raw["pairs"] = tuple((int(high), int(low)) for high, low in raw["pairs"])
        raw["switch_fractions"] = tuple(map(float, raw["switch_fractions"]))
        raw |= {key: int(raw[key]) for key in ("dim", "num_heads")}
        return ArtefactConfig(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{source}: not the description of a scheduler ({error}); copy the folder again, or train again"
        ) from error


def _read_weights(
    read: Callable[[str], bytes | None], folder: str, pair: tuple[int, int]
) -> dict[str, Tensor]:
    path = f"{folder}/{classifier_file(pair)}"
    content = read(path)
    try:
        if content is not None:
            return load(content)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); copy the folder again, or train again") from error
    raise UserError(
        f"{path}: missing, though config.json names the pair; copy the whole folder, or train again"
    )


def _read_published(
    read: Callable[[str], bytes | None], folder: str, pair: tuple[int, int]
) -> dict[str, Tensor]:
    path = f"{folder}/{classifier_file(pair, 'pt')}"
    content = read(path)
    if content is None:
        raise UserError(
            f"{folder}: neither config.json nor {classifier_file(pair, 'pt')}; give the folder that "
            f"`pmpd train --output-dir` wrote "
            "(its scheduler/), or one of published classifier_{high}_{low}.pt files"
        )
    try:
        state = dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(
            f"{path}: not a plain state dict ({error}); save it again as "
            f"`torch.save(classifier.state_dict(), path)`"
        ) from error
    return published_state(state, path)


def published_state(state: Mapping[str, Any], source: str = "state dict") -> dict[str, Tensor]:
    """A published classifier's tensors under our names and in our order, recognised by shape and grouping,
    whatever they are called.

    Recognised: the one 3-D tensor [H, H, D] = the queries; among the groups that share a name up to its last
    dot, each a `weight` and a `bias`: the one with a 1-D weight [H·D] = layer norm, the one with [H·D, H·D] =
    hidden linear, the one with [4, H·D] = head. A prefix common to all (`module.`, `classifier.`) does not
    matter, other tensors are ignored. One that is missing or there twice is a ValueError that lists the names
    and shapes found.

    The published classifier flattens the attended values [H, D] with the head running fastest (index d·H +
    h), ours with the dim (h·D + d): what reads them, the layer norm and the hidden linear's inputs, changes
    its order here.
    """
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def refuse(why: str) -> ValueError:
        return ValueError(f"{source}: not a KV-cache classifier ({why}); found {shapes}")

    queries = [name for name, shape in shapes.items() if len(shape) == 3 and shape[0] == shape[1]]
    if len(queries) != 1:
        raise refuse("expected one query tensor [heads, heads, dim]")
    heads, _, dim = shapes[queries[0]]
    width = heads * dim
    found = {"queries": tensors[queries[0]]}
    for role, shape in (("norm", (width,)), ("hidden", (width, width)), ("head", (NUM_CLASSES, width))):
        groups = [
            name.removesuffix("weight")
            for name in shapes
            if name.endswith(".weight")
            and shapes[name] == shape
            and shapes.get(name.removesuffix("weight") + "bias") == shape[:1]
        ]
        if len(groups) != 1:
            raise refuse(f"expected one weight {list(shape)} with its bias, there are {len(groups)}")
        found |= {f"{role}.{part}": tensors[groups[0] + part] for part in ("weight", "bias")}
    for name in ("norm.weight", "norm.bias", "hidden.weight"):
        found[name] = found[name].unflatten(-1, (dim, heads)).transpose(-1, -2).flatten(-2)
    return {name: tensor.float() for name, tensor in found.items()}
