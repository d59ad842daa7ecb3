"""Which linears of a model the Any-Precision format can hold, found from the model itself."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from pmpd.errors import UserError
from pmpd.kernels.bitplanes import COLUMNS_PER_WORD


@dataclass(frozen=True)
class Layout:
    """The quantized linears are `{model_name}.{layers_name}.{i}.{module}` for i < count and every module of
    `module_names`."""

    model_name: str
    layers_name: str
    module_names: tuple[str, ...]
    count: int
    skipped: dict[str, str]
    """Module inside a decoder layer -> why it stays as it is."""

    @property
    def arch_config(self) -> dict[str, object]:
        """As it stands in `config.json`."""
        return {
            "model_name": self.model_name,
            "layers_name": self.layers_name,
            "module_names": list(self.module_names),
        }

    def path(self, layer: int, module: str) -> str:
        return f"{self.model_name}.{self.layers_name}.{layer}.{module}"


def find_layers(model: nn.Module) -> Layout:
    """The decoder layers are the largest `ModuleList` of modules of one class; what is quantized are the
    plain `nn.Linear`s in them.

    A linear that the format can't hold is in `skipped` with the reason, in all layers if in one (the format
    has one list of names). ValueError: no decoder layers, or nothing in them can be quantized (names the
    modules).
    """
    path, layers = _decoder_layers(model)
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    found: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for layer in layers:
        for name, module in layer.named_modules():
            if name and (reason := _obstacle(module, owners)) is not None:
                skipped.setdefault(name, reason)
            elif isinstance(module, nn.Linear):
                found[name] = found.get(name, 0) + 1
    for name, times in found.items():
        if times < len(layers):
            skipped.setdefault(name, f"only in {times} of {len(layers)} layers")
    names = tuple(name for name in found if name not in skipped)
    if not names:
        reasons = (
            "; ".join(f"{path}.*.{name}: {reason}" for name, reason in skipped.items())
            or "there are no nn.Linear modules in them"
        )
        raise UserError(
            f"nothing in the decoder layers {path} of {type(model).__name__} can be quantized: {reasons}"
        )
    model_name, _, layers_name = path.rpartition(".")
    return Layout(model_name, layers_name, names, len(layers), skipped)


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    best, size = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and "." in name and len({type(layer) for layer in module}) == 1:
            parameters = sum(parameter.numel() for parameter in module.parameters())
            if parameters > size:
                best, size = (name, module), parameters
    if best is None:
        raise UserError(
            f"{type(model).__name__} has no list of decoder layers of one class, so there is nothing to "
            f"quantize"
        )
    return best


def _obstacle(module: nn.Module, owners: dict[int, list[str]]) -> str | None:
    """Why a module that multiplies by a matrix can't be quantized; None for one that can, and for every other
    module."""
    kind = type(module).__name__
    if kind == "Conv1D" or ("Conv" in kind and hasattr(module, "kernel_size")):
        return f"{kind}: convolutional layers have no place in the format"
    if not isinstance(module, nn.Linear):
        return None
    if type(module) is not nn.Linear:
        return f"{kind} is a linear layer with a behaviour of its own"
    if module.in_features % COLUMNS_PER_WORD:
        return f"in_features {module.in_features} is no multiple of {COLUMNS_PER_WORD}"
    if len(owners[id(module.weight)]) > 1:
        return f"its weight is tied: {', '.join(owners[id(module.weight)])} are one tensor"
    return None
