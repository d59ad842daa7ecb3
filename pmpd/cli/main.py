"""The command `pmpd`: one module of this folder per command, imported only when that command is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pmpd
from pmpd.errors import UserError


@dataclass(frozen=True)
class Command:
    """Where a command is: a module with a config dataclass, from which the flags are made, and
    `main(config)`; an int that `main` returns is the exit code."""

    module: str
    config: str
    summary: str
    kept: str | None = None
    """What a stopped run leaves behind."""


COMMANDS = {
    "quantize": Command(
        "pmpd.cli.quantize",
        "QuantizeJob",
        "an Any-Precision checkpoint of an unquantized one",
        "finished layers are kept",
    ),
    "label": Command(
        "pmpd.cli.label", "LabelJob", "prompts, references and labels of texts", "finished rows are kept"
    ),
    "train": Command(
        "pmpd.cli.train", "TrainJob", "the KV-cache scheduler from labels", "finished epochs are kept"
    ),
    "generate": Command(
        "pmpd.cli.generate",
        "GenerateJob",
        "answers of a benchmark under schedulers",
        "finished conversations are kept",
    ),
    "judge": Command(
        "pmpd.cli.judge", "JudgeJob", "ratings of answers by a judge model", "finished judgments are kept"
    ),
    "report": Command("pmpd.cli.report", "ReportJob", "scores, figures and a page from answers"),
    "inspect": Command("pmpd.cli.inspect", "InspectJob", "schema, row counts and nulls of results"),
    "export-fastchat": Command(
        "pmpd.cli.export_fastchat", "ExportJob", "answers as FastChat's judge reads them"
    ),
    "kernels": Command("pmpd.cli.kernels", "KernelsJob", "which kernels multiply on this machine, and why"),
}

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


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
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `pmpd ARGUMENTS` (default: of this process); the exit code."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"pmpd {pmpd.__version__}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"error: pmpd {name}: no such command; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    import tyro

    try:
        rest = _without_secrets(rest)
        module = importlib.import_module(command.module)
        config = tyro.cli(
            getattr(module, command.config), prog=f"pmpd {name}", description=module.__doc__, args=rest
        )
        result = module.main(config)
        return result if isinstance(result, int) else 0
    except UserError as error:
        print(f"error: {_without_secrets([str(error)], redact=True)[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = f"; {command.kept}: run the same command again to go on" if command.kept else ""
        print(f"stopped{again}", file=sys.stderr)
        return INTERRUPTED


def _without_secrets(texts: list[str], redact: bool = False) -> list[str]:
    """Keys and endpoints of URIs are taken off before anything can print or store them. Only where there is a
    URI: pyarrow, which storage needs, takes a while to import."""
    if not any("://" in text for text in texts):
        return texts
    from pmpd.storage.uri import redacted, without_secrets

    return [redacted(text) if redact else without_secrets(text) for text in texts]
