"""The command `pmpd`: one module of this folder per command, imported only when that command is asked for."""

from __future__ import annotations

import importlib
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

import pmpd
from pmpd import threads
from pmpd.errors import UserError


@dataclass(frozen=True)
class Command:
    """Where a command is: `flags/MODULE.py` has the dataclass that its flags are made from, `MODULE.py` has
    `main` of it; an int that `main` returns is the exit code."""

    module: str
    flags: str
    summary: str
    kept: str | None = None
    """What a stopped run leaves behind."""


COMMANDS = {
    "quantize": Command(
        "quantize",
        "QuantizeJob",
        "an Any-Precision checkpoint of an unquantized one",
        "finished texts, layers and tuning steps are kept",
    ),
    "label": Command(
        "label", "LabelJob", "prompts, references and labels of texts", "finished rows are kept"
    ),
    "train": Command("train", "TrainJob", "a learned scheduler from labels", "finished epochs are kept"),
    "generate": Command(
        "generate",
        "GenerateJob",
        "answers of a benchmark under schedulers",
        "finished conversations are kept",
    ),
    "judge": Command(
        "judge", "JudgeJob", "ratings of answers by a judge model", "finished judgments are kept"
    ),
    "chat": Command("chat", "ChatJob", "talk to a model in the terminal, bits in colour"),
    "perplexity": Command(
        "perplexity", "PerplexityJob", "how well a checkpoint foretells a text, at every precision"
    ),
    "report": Command("report", "ReportJob", "scores, figures and a page from answers"),
    "compact": Command(
        "compact", "CompactJob", "few large files in place of many small shards", "every row is kept"
    ),
    "inspect": Command("inspect", "InspectJob", "schema, row counts and nulls of results"),
    "export-fastchat": Command("export_fastchat", "ExportJob", "answers as FastChat's judge reads them"),
    "kernels": Command("kernels", "KernelsJob", "which kernels multiply on this machine, and why"),
}

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

TERMINATED = 143
"""Exit code after SIGTERM (`ray job stop`, a node that is about to go)."""

READER_LEFT = 141
"""Exit code where what reads the output has ended, as of a process that SIGPIPE ended."""

_FLAGS = {"slots": "--batch-size", "unit_rows": "--batch-size"}
"""Names in the library's messages that are flags under another name."""


_EXTRAS = {
    "ray": "farm",
    "optuna": "train",
    "matplotlib": "eval",
    "jinja2": "eval",
    "fastchat": "eval",
    "sacrebleu": "eval",
}
"""Packages that `pip install pmpd` alone does not bring, and the extra that does."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, once: a second one must not disturb the leaving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt as stop:
        if came and not isinstance(stop, Terminated):  # Ray's C++ makes a plain one of it
            raise Terminated from stop
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def in_flags(message: str, config: Any) -> str:
    """A message of the library in the words of the command: a field that begins it (`slots 0: …`), or whose
    name can be no other word (`gpus_per_worker`), is a flag here."""
    flags = {field.name: f"--{field.name.replace('_', '-')}" for field in fields(config)}
    flags = _FLAGS | flags

    def flag(found: re.Match[str]) -> str:
        name = found[0]
        return flags.get(name, name) if "_" in name or found.start() == 0 else name

    return re.sub(r"(?<![\w/.'\"-])[a-z_]+(?![\w/.'\"=-])", flag, message)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pmpd COMMAND [FLAGS]",
            "",
            "Progressive mixed-precision decoding: quantize, label, train, generate, report.",
            "",
            *lines,
            "",
            "pmpd COMMAND --help explains its flags. pmpd --version prints the version.",
            "pmpd --completion bash (or zsh) prints what that shell reads to complete commands and flags.",
        ]
    )


SHELLS = ("bash", "zsh")


def print_completion(shell: str) -> int:
    """Prints what completes all commands and their flags in that shell; the exit code."""
    if shell not in SHELLS:
        print(f"error: pmpd --completion {shell}: known are {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    import tyro

    jobs = {
        name: getattr(importlib.import_module(f"pmpd.cli.flags.{command.module}"), command.flags)
        for name, command in COMMANDS.items()
    }
    with suppress(SystemExit):  # tyro leaves once it has printed
        tyro.extras.subcommand_cli_from_dict(jobs, prog="pmpd", args=["--tyro-print-completion", shell])
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `pmpd ARGUMENTS` (default: of this process); the exit code."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"pmpd {pmpd.__version__}")
        return 0
    if name == "--completion":
        return print_completion(rest[0] if rest else "")
    command = COMMANDS.get(name)
    if command is None:
        print(f"error: pmpd {name}: no such command; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    import tyro

    from pmpd.cli.helptext import with_paragraphs

    threads.prepare()  # before the command's module imports torch
    config: Any = None
    try:
        rest = _without_secrets(rest)
        with terminable():
            flags = importlib.import_module(f"pmpd.cli.flags.{command.module}")
            config = tyro.cli(
                with_paragraphs(getattr(flags, command.flags)),
                prog=f"pmpd {name}",
                description=flags.__doc__,
                args=rest,
            )
            # only now: torch, Ray and transformers take seconds to import
            result = importlib.import_module(f"pmpd.cli.{command.module}").main(config)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except UserError as error:
        told = str(error) if config is None else in_flags(str(error), config)
        print(f"error: {_without_secrets([told], redact=True)[0]}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        extra = "train" if name == "train" else _EXTRAS[missing]
        cure = f"pip install 'pmpd[{extra}]', or 'pmpd[all]'"
        print(f"error: pmpd {name}: this needs the package {missing}; {cure}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        if not _reader_left():
            raise
        return READER_LEFT
    except KeyboardInterrupt as stop:
        again = f"; {command.kept}: run the same command again to go on" if command.kept else ""
        print(f"stopped{again}", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _reader_left() -> bool:
    """Whether nobody reads what is printed (`pmpd … | head`). If so, what is left to print goes nowhere."""
    try:
        printed = sys.stdout.fileno()
    except OSError:  # no file: a notebook's
        return False
    poll = select.poll()
    poll.register(printed, 0)
    left = any(events & select.POLLERR for _, events in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), printed)
    return left


def _without_secrets(texts: list[str], redact: bool = False) -> list[str]:
    """Keys and endpoints of URIs are taken off before anything can print or store them. Only where there is a
    URI: pyarrow, which storage needs, takes a while to import."""
    if not any("://" in text for text in texts):
        return texts
    from pmpd.storage.uri import redacted, without_secrets

    return [redacted(text) if redact else without_secrets(text) for text in texts]
