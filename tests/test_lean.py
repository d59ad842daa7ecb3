"""The lean forward against the model's own modules."""

from __future__ import annotations

import pytest
import torch

from pmpd.engine import Engine, Request
from pmpd.schedulers import Scheduler
from tests.test_engine import random_prompts


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_lean_forward_gives_the_tokens_of_the_modules(anyprec_model, architecture):
    model = anyprec_model(architecture)
    scheduler = Scheduler.get_scheduler("random", precisions=[4, 3, 2])
    requests = [Request(str(i), prompt, 24) for i, prompt in enumerate(random_prompts(6, 70, seed=3))]
    results = []
    for lean in (True, False):
        engine = Engine(model.model, 4, 100, lean=lean)
        assert (engine.lean is not None) == lean
        completions = {c.key: c for c in engine.run(requests, scheduler, 4, ())}
        results.append([(completions[r.key].tokens, completions[r.key].precision_trace) for r in requests])
    assert results[0] == results[1]


@pytest.mark.parametrize("architecture", ["phi", "opt", "stablelm", "qwen3", "gpt_neox"])
def test_a_tree_that_is_not_known_exactly_takes_the_generic_path(anyprec_model, architecture):
    assert Engine(anyprec_model(architecture).model, 1, 10).lean is None


def test_a_changed_module_is_not_recognised(anyprec_folder):
    from pmpd import PMPDForCausalLM

    model = PMPDForCausalLM(anyprec_folder("llama"), kernel="reference")
    assert Engine(model.model, 1, 10).lean is not None
    model.model.model.layers[1].mlp.extra = torch.nn.Dropout(0.1)
    assert Engine(model.model, 1, 10).lean is None
