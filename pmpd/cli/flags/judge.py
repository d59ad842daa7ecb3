"""Have a judge model rate the answers of pmpd generate (MT-Bench), alone or in pairs.

    pmpd judge --judge-url https://api.openai.com/v1 --judge-model gpt-4o     # key: $OPENAI_API_KEY
    pmpd judge --judge-model-path models/judge --mode pair                    # a checkpoint, on the farm

Every judgment is a row: done once, kept when the command is stopped, with an error where the judge gave none.
`pmpd report --inputs results/generate/mt_bench results/judge` shows the scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmpd.errors import UserError


@dataclass(frozen=True)
class JudgeJob:
    """Have a judge model rate answers. One of --judge-url and --judge-model-path is needed."""

    input: str = "results/generate/mt_bench"
    """Output folder of pmpd generate, of one benchmark."""
    judge_url: str | None = None
    """An OpenAI-compatible endpoint, up to its version: https://host/v1."""
    judge_model: str | None = None
    """Name of the judge: what the endpoint is asked for, and what results call it."""
    judge_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key (of the workers, too)."""
    judge_model_path: str | None = None
    """A checkpoint that judges on the farm, instead of an endpoint."""
    mode: Literal["single", "pair", "pair-all"] = "single"
    """single: every answer is rated 1 to 10. pair: every run is compared with --baseline. pair-all: every run
    with every other."""
    baseline: str | None = None
    """pair: the run that all others are compared with; default the highest uniform one."""
    runs: str | None = None
    """Only these runs, comma-separated."""
    judge_prompts: str | None = None
    """FastChat's judge_prompts.jsonl, or a file in its form; default prompts in our own words."""
    judge_references: str | None = None
    """Reference answers for math, reasoning and coding: FastChat's reference_answer/MODEL.jsonl, or its
    question.jsonl."""
    parallel: int = 8
    """Requests to the endpoint at a time."""
    timeout_seconds: float = 120.0
    """Of one request."""
    attempts: int = 6
    """Requests per judgment before it becomes an error row."""
    max_new_tokens: int = 2048
    """Tokens of a judgment at most."""
    template: str | None = None
    """Conversation template of the judging checkpoint; default its tokenizer's own, else by its name."""
    batch_size: int = 16
    """Judgments per unit of work, and that a checkpoint decodes together."""
    num_workers: int | None = None
    """Checkpoint: default one per GPU; without GPUs one per two cores. An endpoint needs one."""
    gpus_per_worker: float | None = None
    """Checkpoint: default 1 where the cluster has GPUs, else 0."""
    output_dir: str = "results/judge"
    """Local folder, shared storage of the cluster, or a URI; a folder for the judge and mode is made in
    it."""
    plugins: str | None = None
    """Python modules to import first, comma-separated: what they register can be named then
    (docs/guides/extensions.md). Workers must be able to import them too."""
    retry_errors: bool = False
    """Do judgments again that have an error."""
    trust_remote_code: bool = False
    """Run model code that comes with the judging checkpoint."""

    def __post_init__(self) -> None:
        if (self.judge_url is None) == (self.judge_model_path is None):
            raise UserError("--judge-url or --judge-model-path: give one of the two, and not both")
        if self.judge_url is not None and not self.judge_model:
            raise UserError("--judge-url: also give --judge-model, the name that the endpoint knows")
        for name, least in (("parallel", 1), ("attempts", 1), ("batch_size", 1), ("max_new_tokens", 16)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least}")
        if not self.timeout_seconds > 0:
            raise UserError(f"--timeout-seconds {self.timeout_seconds}: more than 0")

    @property
    def name(self) -> str:
        """What results call the judge."""
        return self.judge_model or Path(str(self.judge_model_path)).name

    @property
    def prompt_mode(self) -> str:
        return "single" if self.mode == "single" else "pair"
