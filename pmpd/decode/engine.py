"""The engine: one model, one KV cache, and the decode loop over them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmpd.decode.graph_steps import GraphSteps
from pmpd.decode.llama_cpu import recognise
from pmpd.decode.loop import DecodeLoop
from pmpd.decode.pulse import Pulse
from pmpd.decode.requests import Completion, Request, TokenEvent
from pmpd.decode.slots import NEVER, SlotCache, TokenPlaces, slot_attention
from pmpd.errors import UserError
from pmpd.schedulers.base import Scheduler
from pmpd.weights.base import cache_argument, shared_state


def prefill_tokens(device: torch.device, hidden_size: int) -> int:
    """Prompt tokens that are prefilled together: a GPU's host takes as long for few as for many, so small
    models take more."""
    return 16384 if device.type == "cuda" and hidden_size <= 2048 else 4096


class Engine:
    """Decodes requests for one model. Not thread-safe; one `run` at a time.

    `slots`: rows that decode together. `max_length`: prompt plus new tokens that a row may have.
    `sync_every`: steps between two looks at the tokens (more hides the device's latency; rows run on past
    their end in between).
    `lean`: take the written-out forward of `pmpd.decode.llama_cpu` where it knows the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int = 32,
        max_length: int = 2304,
        sync_every: int = 1,
        lean: bool = True,
    ) -> None:
        if slots < 1:
            raise UserError(f"slots {slots}: an engine needs one slot at least")
        self.model = model
        self.slots = slots
        self.max_length = max_length
        self.sync_every = sync_every
        self.state = shared_state(model)
        self.cache_argument = cache_argument(model)
        self.device = next(model.parameters()).device
        self.dtype = cast(Tensor, model.get_input_embeddings().weight).dtype
        self.vocabulary = len(cast(Tensor, model.get_input_embeddings().weight))
        self.lean = recognise(model, self.state) if lean else None
        self.steps = GraphSteps.of(model) if lean and self.device.type == "cuda" else None
        spare = 1 if self.steps else 0  # a slot for the unused rows of a captured step
        layers = getattr(model.config, "num_hidden_layers", 1)
        self.cache = SlotCache(slots + spare, max_length, layers)
        self.told = torch.zeros(slots + spare, max_length + 2, dtype=torch.int64, device=self.device)
        self.tokens, self.bad = self.told[:, :-1], self.told[:, -1]
        self.bad[:] = NEVER
        self.prefill_tokens = prefill_tokens(self.device, model.config.get_text_config().hidden_size)
        self.pulse = Pulse()

    def run(
        self,
        requests: Iterable[Request],
        scheduler: Scheduler | None,
        prefill_bits: int,
        eos_token_ids: Collection[int],
    ) -> Iterator[Completion]:
        """Decodes all `requests`, in any order of completion. `scheduler` None: every forward at
        `prefill_bits`.

        A request that does not fit `max_length`, or whose logits are not finite, completes with `error` set.
        """
        events = DecodeLoop(self, requests, scheduler, prefill_bits, eos_token_ids, stream=False).events()
        return (event for event in events if isinstance(event, Completion))

    def stream(
        self,
        requests: Iterable[Request],
        scheduler: Scheduler | None,
        prefill_bits: int,
        eos_token_ids: Collection[int],
    ) -> Iterator[TokenEvent | Completion]:
        """As `run`, with a `TokenEvent` for every token before the row's `Completion`. Looks at the tokens
        after every step."""
        return DecodeLoop(self, requests, scheduler, prefill_bits, eos_token_ids, stream=True).events()

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, places: TokenPlaces, keep: Tensor | None) -> Tensor:
        """Logits [len(keep), V] after the tokens `keep` int64 of the flat forward `input_ids` int64 [n]; None
        keeps all."""
        if self.lean is not None:
            return self.lean(input_ids, places, keep, self.cache)
        with slot_attention(self.model, self.cache, places):
            output = self.model(
                input_ids=input_ids[None],
                position_ids=places.positions[None],
                use_cache=True,
                logits_to_keep=0 if keep is None else keep,
                **{self.cache_argument: self.cache},
            )
        return output.logits[0]
