"""Prompts as a model was trained to read them: the tokenizer's own chat template, else FastChat's for the
model id.

Only `fastchat.conversation` is imported (pure Python); FastChat's own choice of a template lives beside its
model loaders and would import several gigabytes of packages, so the choice is restated here and compared with
FastChat's in a test.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmpd.benchmarks.tokens import special_tokens
from pmpd.errors import UserError

PLAIN = "plain"
"""No roles and no separators but blank lines: for models that were trained on plain text."""
TOKENIZER = "tokenizer"
"""The chat template that the model's own tokenizer carries."""
# First match wins, so the narrower name stands first. Matched against the last part of the model id, in lower
# case.
MODEL_TEMPLATES: tuple[tuple[str, str], ...] = (
    (r"demo", PLAIN),
    (r"stable-vicuna", "stable-vicuna"),
    (r"vicuna|longchat|mobilellama.*chat|mobilevlm", "vicuna_v1.1"),
    (r"stablelm", "stablelm"),
    (r"zephyr", "zephyr"),
    (r"tinyllama", "TinyLlama"),
    (r"orca-2", "orca-2"),
    (r"openchat", "openchat_3.5"),
    (r"openhermes", "OpenHermes-2.5-Mistral-7B"),
    (r"codellama|llama-?2", "llama-2"),
    (r"mistral|mixtral", "mistral"),
    (r"qwen", "qwen-7b-chat"),
    (r"yi-.*chat", "Yi-34b-chat"),
    (r"falcon.*chat", "falcon-chat"),
    (r"falcon", "falcon"),
    (r"mpt-.*chat", "mpt-7b-chat"),
    (r"koala", "koala_v1"),
    (r"alpaca", "alpaca"),
    (r"solar", "solar"),
    (r"deepseek-coder", "deepseek-coder"),
    (r"deepseek.*chat", "deepseek-chat"),
    (r"tulu", "tulu"),
    (r"dolly", "dolly_v2"),
    (r"chatglm3", "chatglm3"),
    (r"baichuan2.*chat", "baichuan2-chat"),
)


@dataclass(frozen=True)
class Stops:
    """What ends an answer besides the model's own end-of-sequence tokens."""

    strings: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()

    def cut(self, text: str) -> str:
        """The answer without what follows the first stop string (a stop string at the very start is kept, as
        FastChat does)."""
        ends = [position for position in (text.find(string) for string in self.strings) if position > 0]
        return text[: min(ends)] if ends else text


def choose_template(model_id: str, tokenizer: Any = None, override: str | None = None) -> str:
    """The template's name: `override` if given, else the tokenizer's own, else FastChat's for the model id,
    else plain text (a template of another model would be a wrong one).

    UserError for an unknown override, or one that this tokenizer can't serve.
    """
    if override is not None:
        if override not in (PLAIN, TOKENIZER) and override not in (known := template_names()):
            raise UserError(f"--template {override}: known are {', '.join(known)}")
        if override == TOKENIZER and tokenizer is not None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "--template tokenizer: this model's tokenizer has no chat template; choose one of FastChat's"
            )
        return override
    if getattr(tokenizer, "chat_template", None):
        return TOKENIZER
    template = _by_model_id(model_id) or PLAIN
    if template != PLAIN:
        template_names()  # without FastChat it fails here, and not in every row of every worker
    return template


def template_note(template: str, model_id: str, override: str | None) -> str:
    """For people: the template that was taken, and why."""
    if override is not None:
        return f"{template} (--template)"
    if template == TOKENIZER:
        return f"{template} (the chat template of the model's own tokenizer)"
    if _by_model_id(model_id) == template:
        return f"{template} (by the model id {model_id}; --template names another)"
    return (
        f"{template}: the tokenizer has no chat template and none is known for the model id "
        f"{model_id}, so prompts "
        f"are plain text; if this is a chat model, name its template with --template"
    )


def _by_model_id(model_id: str) -> str | None:
    name = model_id.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((template for pattern, template in MODEL_TEMPLATES if re.search(pattern, name)), None)


@functools.cache
def template_names() -> tuple[str, ...]:
    from fastchat.conversation import conv_templates

    return (PLAIN, TOKENIZER, *sorted(conv_templates))


def render(template: str, turns: Sequence[str], answers: Sequence[str], tokenizer: Any = None) -> str:
    """The prompt for the next answer: `turns` said by the user so far, `answers` to all of them but the
    last."""
    assert len(answers) == len(turns) - 1, "an answer to every turn but the last"
    if template == TOKENIZER:
        messages: list[dict[str, str]] = []
        for turn, answer in zip(turns, [*answers, None], strict=True):
            messages.append({"role": "user", "content": turn})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if template == PLAIN:
        said = itertools.chain.from_iterable(zip(turns, [*answers, ""], strict=True))
        return "".join(f"{text}\n\n" for text in said if text)
    conversation = _conversation(template)
    for turn, answer in zip(turns, [*answers, None], strict=True):
        conversation.append_message(conversation.roles[0], turn)
        conversation.append_message(conversation.roles[1], answer)
    return conversation.get_prompt()


def stops(template: str, tokenizer: Any = None) -> Stops:
    """What ends an answer under a template. FastChat's token ids belong to the model it wrote the template
    for, so only those count that are special tokens of `tokenizer`: to another one, 0 may be an exclamation
    mark."""
    if template in (PLAIN, TOKENIZER):
        return Stops()
    conversation = _conversation(template)
    strings = conversation.stop_str or ()
    ids = frozenset(conversation.stop_token_ids or ())
    return Stops(
        (strings,) if isinstance(strings, str) else tuple(strings),
        ids if tokenizer is None else ids & special_tokens(tokenizer).keys(),
    )


def _conversation(template: str) -> Any:
    from fastchat.conversation import get_conv_template

    return get_conv_template(template)
