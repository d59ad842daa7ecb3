"""`PMPDForCausalLM`: weights, tokenizer and scheduler behind `generate()`."""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmpd import gpu
from pmpd.decode.ending import end_token_ids, give_pad_token
from pmpd.decode.engine import Engine
from pmpd.decode.padded import GenerateOutput, output_of, raise_error, requests_of
from pmpd.decode.pulse import Pulse
from pmpd.decode.requests import Completion, Further, More, Prefix, Request, Sampling, TokenEvent
from pmpd.errors import UserError
from pmpd.schedulers.base import Scheduler
from pmpd.weights import formats, mixed
from pmpd.weights.base import PrecisionLinear, compute_dtype, head_dim, kv_heads
from pmpd.weights.byte_head import byte_head_impossible, byte_head_unavailable, use_byte_head
from pmpd.weights.mixed import MultiCheckpoint
from pmpd.weights.model_spec import ModelSpec

_log = logging.getLogger(__name__)

ENGINE_LENGTHS = 256
"""On a GPU an engine's rows have room for a multiple of so many tokens."""
ROOMY_LENGTH, ROOMY_SHARE = 2304, 0.25
"""On a GPU a new engine has room for prompt and continuation by the commands' defaults at once, where its
cache takes such a share of the free memory at most: a longer prompt later on costs all captured steps."""


class PMPDForCausalLM(nn.Module):
    """A causal language model whose linear layers hold several weight precisions.

    `model_path`: an Any-Precision checkpoint folder, or an unquantized one (then precisions is (16,)), or the
    Hugging Face id of one, or a JSON file that names a checkpoint folder (GPTQ, for one) for each precision.
    `use_anyprec=False`: it must be the JSON. Then `.model.models[str(bits)].config` is the config; the
    modules exist once. `precisions`: those to load (default: all the checkpoint holds). `prefill_bit`
    defaults to the highest of them. `dtype`: what activations and unquantized weights are (default: float32;
    `.cuda()` keeps it, so pass float16 there). `kernel`: forces an implementation of the multiplication
    (`reference`, `cpu`, `triton`, `cuda`, `dense`). `head_bits` 8: the head has 8 bits instead of 16, which
    halves what is read of it (bfloat16 on a CPU with AVX2; float16 or bfloat16 on a GPU).
    `trust_remote_code`: allows model code from the checkpoint folder to run.

    ValueError: no such checkpoint, precisions it does not hold, tensors missing or misshapen.
    """

    def __init__(
        self,
        model_path: str | Path,
        precisions: Sequence[int] | None = None,
        use_anyprec: bool = True,
        *,
        dtype: torch.dtype | None = None,
        kernel: str | None = None,
        head_bits: int = 16,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if head_bits not in (16, 8):
            raise UserError(f"head bits {head_bits}: a head has 16 bits or 8")
        try:
            wanted = (
                None
                if precisions is None
                else sorted({operator.index(bits) for bits in precisions}, reverse=True)
            )
        except TypeError:  # not a list, or not of whole numbers
            wanted = []
        if wanted == []:
            raise UserError(
                f"precisions {precisions!r}: give a list like [4, 3, 2], or None for all that the checkpoint "
                f"holds"
            )
        dtype = dtype or compute_dtype(torch.device("cpu"))
        problem = None if head_bits == 16 else byte_head_impossible(dtype, kernel)
        if problem:
            raise UserError(f"head of 8 bits: {problem}")
        spec = ModelSpec(
            str(model_path), not use_anyprec, trust_remote_code=trust_remote_code, flag="model_path"
        )
        checkpoint = spec.open()
        self.model_path = Path(model_path)
        self.fingerprint = checkpoint.fingerprint()
        self.model: PreTrainedModel
        if isinstance(checkpoint, MultiCheckpoint):
            self.precisions = tuple(wanted or checkpoint.precisions)
            self.model = mixed.load(checkpoint, self.precisions, dtype, kernel)
            # a plain attribute, which the annotations of nn.Module do not know
            self.model.models = {  # type: ignore[assignment]
                str(bits): SimpleNamespace(config=self.model.config) for bits in self.precisions
            }
        else:
            self.model, self.precisions = formats.load(checkpoint, wanted, dtype, kernel)
        if head_bits == 8:
            use_byte_head(self.model)
        self.tokenizer = checkpoint.tokenizer()
        give_pad_token(self.tokenizer)
        self.eos_token_ids = end_token_ids(self.model, self.tokenizer)
        self.scheduler: Scheduler | None = None
        self._engine: Engine | None = None
        self.pulse = Pulse()
        self._most_slots = 2**31  # more ran out of memory

    @classmethod
    def from_pretrained(
        cls, model_path: str | Path, precisions: Sequence[int] | None = None, **options
    ) -> PMPDForCausalLM:
        """The same as the constructor, under the name that transformers users look for."""
        return cls(model_path, precisions, **options)

    @classmethod
    def from_spec(cls, spec: ModelSpec, device: torch.device) -> PMPDForCausalLM:
        """The model of `spec` on `device`."""
        dtype = spec.compute_dtype(device)
        problem = None if spec.head_bits == 16 else byte_head_unavailable(dtype, device, spec.kernel)
        if problem:
            raise UserError(f"--head-bits {spec.head_bits}: {problem}")
        model = cls(
            spec.path,
            spec.precisions,
            not spec.multi_model,
            dtype=dtype,
            kernel=spec.kernel,
            head_bits=spec.head_bits,
            trust_remote_code=spec.trust_remote_code,
        )
        return model.to(device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def max_positions(self) -> int:
        """Tokens a sequence can have, prompt and continuation together."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31))

    def engine(self, slots: int | None = None, max_length: int | None = None) -> Engine:
        """An engine of at least that size, kept and reused while it is large enough.

        `slots` None: on a GPU what its free memory holds, on a CPU 32. Never more than the memory has been
        seen to hold (`complete`).
        """
        max_length = max_length or self.max_positions
        if self.device.type == "cuda":  # one engine, with its captured steps, for prompts of many lengths
            max_length = -(-max_length // ENGINE_LENGTHS) * ENGINE_LENGTHS
        max_length = min(max_length, self.max_positions)
        engine = self._engine
        if engine is not None and (engine.max_length < max_length or engine.device != self.device):
            engine = self._engine = None  # its cache goes before the new one is planned
        if slots is None:
            slots = engine.slots if engine is not None else self._planned_slots(max_length)
        slots = min(slots, self._most_slots)
        if engine is None or engine.slots < slots:
            engine = self._engine = None
            max_length = self._roomy(slots, max_length)
            # a GPU runs ahead of the host, so the host looks at the tokens now and then only
            with torch.inference_mode(False):  # also where a caller is in it: others write to it outside
                engine = self._engine = Engine(
                    self.model, slots, max_length, sync_every=8 if self.device.type == "cuda" else 1
                )
        return engine

    def _apply(self, fn, recurse: bool = True):  # nn.Module's hook behind .to(), .cuda(), .half()
        self._engine = None  # has a cache of the old dtype, and layers packed for it
        return super()._apply(fn, recurse)

    @contextmanager
    def _borrowed(self, slots: int | None, max_length: int) -> Iterator[Engine]:
        """The kept engine, for one decode: whoever wants to decode before that has ended gets another one,
        since its cache is in use."""
        engine = self.engine(slots, max_length)
        engine.pulse = self.pulse
        self._engine = None
        try:
            yield engine
        finally:
            self._engine = engine

    def complete(
        self,
        requests: Sequence[Request],
        scheduler: Scheduler | None,
        prefill_bit: int,
        slots: int | None = None,
        eos_token_ids: Collection[int] | None = None,
        more: More | None = None,
    ) -> Iterator[Completion]:
        """`Engine.run` that survives an out-of-memory: the slots are halved, for good, and what is unfinished
        is done again.

        `slots`: requests that decode together (None: as many as memory holds). `eos_token_ids`: default the
        model's. `more`: what slots are given to when no request waits for one.
        """
        open_keys: dict[str, Request] = {}
        """Key of a completion that is still to come -> the request it comes of. What is done is let go of:
        `more` may go on for days."""

        def take(further: Iterable[Request]) -> None:
            open_keys.update((key, request) for request in further for key in request.all_keys())

        take(requests)
        longest = max((len(request.input_ids) + request.max_new_tokens for request in requests), default=1)
        ends = self.eos_token_ids if eos_token_ids is None else eos_token_ids
        engine: Engine | None
        while True:
            left = list({request.key: request for request in open_keys.values()}.values())
            engine, used = None, slots
            try:
                with self._borrowed(slots, longest) as engine:
                    used = engine.slots
                    source = Further(left, more, engine.max_length, take)
                    for completion in engine.run(source, scheduler, prefill_bit, ends):
                        if open_keys.pop(completion.key, None) is not None:
                            yield completion
                return
            except RuntimeError as error:
                if not gpu.is_out_of_memory(error) or used is None or used == 1:
                    raise
            engine = self._engine = None
            self._most_slots = used // 2
            gpu.release_memory()
            _log.warning("out of memory with %d rows at a time; going on with %d", used, self._most_slots)

    @property
    def kv_heads(self) -> int:
        return kv_heads(self.model.config)

    @property
    def head_dim(self) -> int:
        return head_dim(self.model.config)

    def _planned_slots(self, max_length: int) -> int:
        if self.device.type != "cuda":
            return 32
        return gpu.plan_slots(self._free_bytes(), self._token_bytes, max_length)

    def _roomy(self, slots: int, max_length: int) -> int:
        """Tokens that a row of a new engine has room for: on a GPU with memory to spare more than asked."""
        roomy = min(ROOMY_LENGTH, self.max_positions)
        if self.device.type != "cuda" or roomy <= max_length:
            return max_length
        spare = ROOMY_SHARE * self._free_bytes()
        return roomy if slots * roomy * self._token_bytes <= spare else max_length

    @property
    def _token_bytes(self) -> int:
        """Of the cache, for each token of a row."""
        element_bytes = next(self.model.parameters()).element_size()
        return 2 * self.model.config.num_hidden_layers * self.kv_heads * self.head_dim * element_bytes

    def _free_bytes(self) -> int:
        """Of the GPU, once the weights are packed for its kernels."""
        for module in self.model.modules():
            if isinstance(module, PrecisionLinear):
                module.packed_bytes()
        return gpu.free_bytes(self.device)

    def decide(self, scheduler: Scheduler | None, prefill_bit: int | None) -> tuple[Scheduler | None, int]:
        """Checks scheduler and prefill precision against the model and what is loaded; the precision defaults
        to the highest."""
        if scheduler is not None:
            scheduler.check_model(self.fingerprint, self.head_dim, self.kv_heads)
        bits = prefill_bit if prefill_bit is not None else self.precisions[0]
        wanted = {bits, *(scheduler.precisions if scheduler else ())}
        absent = sorted(wanted - set(self.precisions))
        if absent:
            raise UserError(
                f"precision {', '.join(map(str, absent))} of the scheduler or of prefill_bit is not loaded; "
                f"loaded are {', '.join(map(str, self.precisions))}: pass precisions= to PMPDForCausalLM"
            )
        return scheduler, bits

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 256,
        prefill_bit: int | None = None,
        past_key_values: Sequence[Prefix] | None = None,
        attention_mask: Tensor | None = None,
        keys: Sequence[str] | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
    ) -> GenerateOutput:
        """Continuation of a batch of prompts under `self.scheduler` (None: all at `prefill_bit`), greedy
        unless a `temperature` above 0 asks for sampling.

        `input_ids` int64 [B, L] and `attention_mask` [B, L] (1 = token; padding on either side; default: no
        padding). `past_key_values`: as returned by an earlier call, for prompts that begin with that call's
        tokens; the rest is prefilled. `keys`: names of the rows, from which sampling and random schedulers
        draw (default: a hash of the prompt; equal prompts are answered alike unless they have names).
        `temperature`, `top_p`, `top_k`, `seed`, `repetition_penalty`: see `pmpd.decode.requests.Sampling`.
        `stop`: a row ends with the token that completes one of these strings; the string stays in its tokens.
        """
        sampling = Sampling(temperature, top_p, top_k, seed, repetition_penalty)
        requests = requests_of(
            self.tokenizer, input_ids, max_new_tokens, past_key_values, attention_mask, keys, sampling, stop
        )
        scheduler, bits = self.decide(self.scheduler, prefill_bit)
        by_key = {
            completion.key: completion
            for completion in self.complete(requests, scheduler, bits, len(requests))
        }
        pad = self.tokenizer.pad_token_id
        return output_of(
            requests,
            [by_key[request.key] for request in requests],
            min(self.eos_token_ids, default=0) if pad is None else pad,
            self.device,
        )

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 256,
        prefill_bit: int | None = None,
        past_key_values: Sequence[Prefix] | None = None,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[int, int]]:
        """As `generate` for one prompt int64 [1, L], yielding (token, precision) as soon as each token is
        known. Streams and calls may take turns: each decodes with a cache of its own."""
        requests = requests_of(
            self.tokenizer,
            input_ids,
            max_new_tokens,
            past_key_values,
            None,
            None,
            sampling or Sampling(),
            stop,
        )
        if len(requests) != 1:
            raise UserError(f"stream takes one prompt, got {len(requests)}; use generate for a batch")
        for event in self.stream_request(requests[0], self.scheduler, prefill_bit):
            if isinstance(event, TokenEvent):
                yield event.token, event.bits
            else:
                raise_error(event)

    def stream_request(
        self, request: Request, scheduler: Scheduler | None, prefill_bit: int | None = None
    ) -> Iterator[TokenEvent | Completion]:
        """The tokens of one request as they come, then its completion."""
        scheduler, bits = self.decide(scheduler, prefill_bit)
        with self._borrowed(1, len(request.input_ids) + request.max_new_tokens) as engine:
            yield from engine.stream([request], scheduler, bits, self.eos_token_ids)
