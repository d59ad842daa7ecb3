"""`published_steps`: the published code's count of steps, on plans and trajectories written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pmpd import Scheduler
from pmpd.decode import oracle
from pmpd.decode.engine import Engine
from pmpd.decode.requests import Request
from pmpd.evaluation.sweep import SweepConfig, sweep_runs
from pmpd.schedulers.artefact import ArtefactConfig, save_artefact
from pmpd.schedulers.classifier import KVCacheClassifier
from pmpd.schedulers.kv_cache import KVCacheScheduler
from tests.test_engine import expanded, random_prompts

CHAIN = (4, 3, 2)


@pytest.mark.parametrize(
    ("chain", "steps", "bits"),
    [
        # 9 new tokens: the prefill, then 8 decode forwards
        ((4, 3), 0, [4, 4, 3, 3, 3, 3, 3, 3, 3]),
        ((4, 3), 3, [4, 4, 4, 4, 4, 3, 3, 3, 3]),
        ((4, 3, 2), 2, [4, 4, 4, 4, 2, 2, 2, 2, 2]),
        ((4, 3, 2), [1, 4], [4, 4, 4, 3, 3, 3, 2, 2, 2]),
        ((4, 3), 100, [4] * 9),
    ],
)
def test_static_runs_one_forward_more_and_one_number_switches_every_pair(anyprec_model, chain, steps, bits):
    model = anyprec_model("llama")
    scheduler = Scheduler.get_scheduler("naive", precisions=chain, high_bit_steps=steps, published_steps=True)
    (completion,) = Engine(model.model, 1, 20).run([Request("a", [1, 2, 3], 9)], scheduler, 4, ())
    assert expanded(completion) == bits
    ours = Scheduler.get_scheduler("naive", precisions=chain, high_bit_steps=steps)
    assert "published_steps" not in ours.describe()
    assert scheduler.describe()["published_steps"] is True


@pytest.fixture
def artefact(tmp_path):
    """Classifiers that differ, and decide by what they see."""
    torch.manual_seed(5)
    states = {}
    for pair in ((4, 3), (3, 2)):
        classifier = KVCacheClassifier(16, 2)
        torch.nn.init.normal_(classifier.queries, std=4.0)
        torch.nn.init.normal_(classifier.head.weight, std=4.0)
        states[pair] = classifier.state_dict()
    save_artefact(tmp_path, ArtefactConfig(16, 2, tuple(states)), states)
    return tmp_path


def test_kv_cache_decides_after_the_first_new_token_once_for_all_pairs(anyprec_model, artefact):
    model, ends = anyprec_model("llama"), anyprec_model("llama").eos_token_ids
    scheduler = KVCacheScheduler(CHAIN, save_dir=artefact, published_steps=True)
    prompts = random_prompts(12, 50, seed=3)
    requests = [Request(str(i), prompt, 16) for i, prompt in enumerate(prompts)]
    seen = set()
    for completion in Engine(model.model, 5, 80, sync_every=3).run(requests, scheduler, 4, ends):
        prompt = prompts[int(completion.key)]
        truth = oracle.decode(model.model, prompt, 16, 4, ends, scheduler, key=completion.key)
        assert completion.tokens == truth.tokens
        assert expanded(completion) == truth.bits
        if len(truth.tokens) < 2:
            assert completion.classes is None, "it ended before its decision point"
            continue
        # by hand: the cache of prompt and first new token, the first pair's classifier, m = 15 forwards
        with torch.inference_mode():
            model.model.get_submodule("model.layers.0.self_attn.q_proj").state.set_uniform(4)
            ids = torch.tensor([[*prompt, truth.tokens[0]]])
            layer = model.model(ids, use_cache=True).past_key_values.layers[-1]
            features = [part[0].float().mean(0).half().float()[None] for part in (layer.keys, layer.values)]
            classifier = scheduler.artefact.classifiers[0]
            best = int(classifier(*features, torch.tensor([ids.shape[1]])).argmax())
        assert completion.classes.tolist() == [best, best]
        high = (0, 5, 10, 15)[best] + 1
        assert truth.bits[1:] == [4 if t <= high else 2 for t in range(1, len(truth.bits))]
        seen.add(best)
    assert len(seen) > 1, "all rows decided alike: this shows nothing"


def test_published_runs_stand_beside_ours_under_names_of_their_own(artefact):
    options = {
        "kv_cache": {"save_dir": str(artefact), "published_steps": True},
        "naive": {"published_steps": True},
    }
    runs = sweep_runs(SweepConfig(("static", "kv_cache"), options=options, high_bit_steps=((0, 0),)))
    assert [run.name for run in runs] == ["static-0/0-published", "kv_cache-published"]
    assert np.asarray([run.scheduler().published_steps for run in runs]).all()
