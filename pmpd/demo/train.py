"""Trains the demo model: `python -m pmpd.demo.train --output-dir pmpd/demo/model`.

A Llama of 2.6 million parameters with a byte-level BPE tokenizer of 2,048 entries, on the training documents
of `pmpd.demo.texts`. The checkpoint with the lowest validation loss is kept. On 2 CPU cores the default takes
about 25 minutes.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pmpd.demo.texts import Document, documents_of

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TrainConfig:
    output_dir: Path = Path("pmpd/demo/model")
    """Folder the model and its tokenizer are written to."""
    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 480
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    positions: int = 1024
    """Longest sequence the model can hold, in tokens."""
    sequence_length: int = 512
    """Length of a training sequence, in tokens; the last `long_share` of the steps train on `positions`
    tokens."""
    long_share: float = 0.15
    steps: int = 1900
    """Optimizer steps."""
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    evaluate_every: int = 100
    """Steps between two looks at the validation loss."""


def train_tokenizer(documents: list[Document], vocab_size: int, positions: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
    )


def token_stream(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> torch.Tensor:
    """All documents in one int64 vector, each between two end-of-text tokens (the first serves as the
    beginning)."""
    ids = [tokenizer.eos_token_id]
    for document in documents:
        ids += [*tokenizer(document.text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def stream_loss(model: torch.nn.Module, stream: torch.Tensor, length: int) -> float:
    """Mean negative log-likelihood (nats per token) over non-overlapping windows of `length` tokens."""
    total, count = 0.0, 0
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1]
        logits = model(input_ids=window[None, :-1]).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return total / count


def main(config: TrainConfig) -> None:
    torch.manual_seed(config.seed)
    order = random.Random(config.seed)
    documents = documents_of("train")
    tokenizer = train_tokenizer(documents, config.vocab_size, config.positions)
    validation = token_stream(tokenizer, documents_of("validation"))
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(0.9, 0.95),
    )  # fmt: skip
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(documents)} training documents",
        flush=True,
    )

    best, history, stream, position, started = (
        math.inf,
        [],
        torch.empty(0, dtype=torch.long),
        0,
        time.monotonic(),
    )
    for step in range(1, config.steps + 1):
        if position + config.tokens_per_step + 1 > len(
            stream
        ):  # a new epoch: the documents in a new order, so other neighbours
            order.shuffle(documents)
            stream, position = token_stream(tokenizer, documents), 0
        window = stream[position : position + config.tokens_per_step + 1]
        position += config.tokens_per_step
        warm = min(1.0, step / 50)
        rate = (
            config.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        length = config.positions if step > config.steps * (1 - config.long_share) else config.sequence_length
        logits = model(input_ids=window[:-1].view(-1, length)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % config.evaluate_every == 0 or step == config.steps:
            validation_loss = stream_loss(model, validation, config.positions)
            history.append({"step": step, "train_loss": loss.item(), "validation_loss": validation_loss})
            print(
                f"step {step}/{config.steps}  train {loss.item():.3f}  validation {validation_loss:.3f}"
                f" (perplexity {math.exp(validation_loss):.1f})  {time.monotonic() - started:.0f} s",
                flush=True,
            )
            if validation_loss < best:
                best = validation_loss
                _save(model, tokenizer, config.output_dir)
    (config.output_dir / "training.json").write_text(json.dumps({"history": history}, indent=1) + "\n")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes float16 weights; the model itself goes on in float32."""
    half = {
        name: tensor.to(torch.float16)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    model.save_pretrained(folder, state_dict=half)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(tyro.cli(TrainConfig))
