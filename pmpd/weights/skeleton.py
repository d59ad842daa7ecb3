"""The model of a checkpoint's config without its weights, and the weights put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from pmpd.errors import UserError
from pmpd.weights.checkpoint import Checkpoint, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pmpd.weights.naming import NamedTensors

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SCALES = ("_scale", "_scale_inv", "_zero_point", ".absmax", ".quant_map")
"""What tools that quantize store beside a weight: without it the weight is another one."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
"""What configs call the number of experts of a mixture."""


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules are built without memory for their parameters; buffers (rotary frequencies) are
    real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None:
            module._parameters[name] = nn.Parameter(param.data.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]  # mypy counts self twice
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of the checkpoint's config with all parameters on the meta device, in eval mode.

    ValueError naming a kind of model whose rows can't share a forward.
    """
    config = checkpoint.config()
    problem = _unsupported_config(config)
    if problem is None:
        try:
            with _parameters_on_meta():
                model = AutoModelForCausalLM.from_config(
                    config,
                    trust_remote_code=checkpoint.trust_remote_code,
                    dtype=torch.float32,
                    attn_implementation="sdpa",
                )
        except Exception as error:  # each model class checks its config in a way of its own
            if isinstance(error, ValueError) and "scaled_dot_product_attention" in str(error):
                problem = f"this attention: {error}"
            elif isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
                raise UserError(
                    f"checkpoint {checkpoint.folder}: models of type {config.model_type!r} are no causal "
                    f"language models; give one that continues a text"
                ) from error
            else:
                raise UserError(
                    f"checkpoint file {checkpoint.folder / 'config.json'} makes no model with this version "
                    f"of transformers ({one_line(error)}); correct it, or copy it again"
                ) from error
        else:
            problem = _unsupported(model)
    if problem:
        raise UserError(
            f"checkpoint {checkpoint.folder}: models of type {config.model_type!r} are not supported with "
            f"{problem}"
        )
    if checkpoint.generation_json:
        model.generation_config = GenerationConfig.from_dict(checkpoint.generation_json)
    return model.eval()


def _unsupported_config(config: PreTrainedConfig) -> str | None:
    """What can be told before the model is built; None for all else."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder beside the decoder"
    text = config.get_text_config(decoder=True)
    if text is not config:
        return (
            "inputs other than text; save its language model alone (model.language_model, with the head, as "
            "the text model's class) and give that"
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"chunked attention (attention_chunk_size {config.attention_chunk_size})"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"soft-capped attention (attn_logit_softcapping {config.attn_logit_softcapping})"
    experts = next((getattr(config, name) for name in _EXPERTS if getattr(config, name, None)), None)
    if experts:
        return f"a mixture of experts ({experts} of them): MoE layers have no weights of several precisions"
    return None


def _unsupported(model: PreTrainedModel) -> str | None:
    """What keeps rows of several positions from sharing a forward of this model; None for all else."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for settings in (rope, *rope.values()):  # some have one per type of layer
        kind = settings.get("rope_type", settings.get("type")) if isinstance(settings, dict) else None
        if kind in ("dynamic", "longrope"):
            return f"rope type {kind!r}: its frequencies follow the longest row of the batch"
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others or model._is_stateful:
        return (
            f"layers other than full and sliding attention ({', '.join(sorted(others)) or 'recurrent ones'})"
        )
    own = type(model).__module__.startswith(
        "transformers."
    )  # code of a checkpoint is judged by what it does, in `slots`
    if own and not model._can_set_attn_implementation():
        return "attention of their own, past transformers' attention interface"
    return None


def replace_linears(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module | None]) -> None:
    """Puts `make(name, linear)` in the place of every `nn.Linear` for which it is not None."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            replacement = make(name, module)
            if replacement is not None:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, replacement)


def fill(model: PreTrainedModel, tensors: NamedTensors, dtype: torch.dtype | None) -> None:
    """Gives every parameter that is still on the meta device its tensor from the checkpoint, floating ones as
    `dtype` (None: as stored, and not copied). Of two names for one parameter (a tied head) the file may hold
    either; where it holds both and they differ, both are kept, as transformers does.

    UserError naming all tensors that are missing, of another shape, or no floating point numbers.
    """
    problems, names = [], tensors.names()
    missing = {name for pair in model.all_tied_weights_keys.items() for name in pair if name not in names}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            continue
        if name not in names:
            missing.add(name)
            continue
        tensor = tensors.tensor(name)
        if tensor.shape != parameter.shape:
            problems.append(
                f"{name} has shape {list(tensor.shape)}, the config asks for {list(parameter.shape)}"
            )
            continue
        if parameter.is_floating_point() and tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            problems.append(f"{name} is {kind}: another tool quantized it; give the unquantized model")
            continue
        scale = next((name + suffix for suffix in _SCALES if name + suffix in names), None)
        if scale is not None:
            problems.append(
                f"{name} has {scale} beside it: another tool quantized it; give the unquantized model"
            )
            continue
        module_name, _, attribute = name.rpartition(".")
        model.get_submodule(module_name)._parameters[attribute] = nn.Parameter(
            tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor, requires_grad=False
        )
    for name, buffer in list(model.named_buffers()):
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if name in names and attribute not in module._non_persistent_buffers_set:
            stored = tensors.tensor(name)
            module._buffers[attribute] = (
                stored.to(dtype or stored.dtype) if buffer.is_floating_point() else stored
            )
    model.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta and name in missing]
    problems = [*(f"{name} is missing" for name in absent), *problems]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"checkpoint {tensors.folder} does not fit its own config.json: {shown}")
