"""'Ovi Step Cache': nothing of one sampling reaches another."""

import gc

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from ovi_native.ovi_model.sampling.solvers import make_sampler
from ovi_native.ovi_model.sampling.step_cache import (
    CachedPrediction,
    Settings,
    StepCache,
    set_step_cache,
)
from support.cached_runs import ANYTHING, CONDS, sample
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_equal
from tiny.inputs import joint, noise
from tiny.models import Batches, load
from tiny.sizes import Sizes


@pytest.fixture(scope="module")
def model():
    return load(draw_weights(Sizes(blocks=2)))


def test_the_next_sampling_starts_afresh(model):
    cached = set_step_cache(model, ANYTHING)
    first = sample(cached)
    sample(cached, seed=9)
    assert_pair_equal(sample(cached), first)


def test_nothing_is_kept_after_an_error(model):
    class Stop(Exception):
        pass

    def stop_in_step_4(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Stop
        return executor(*args, **kwargs)

    calls, lines = [], []
    cached = set_step_cache(model, Settings(0.0, 0.0, 0.0, 1.0), lines.append)
    cached.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stop", stop_in_step_4)
    with pytest.raises(Stop):
        sample(cached)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, CachedPrediction)]
    assert lines == ["skipped 0 of 4 passes through the model"]
    assert_pair_equal(sample(cached), sample(model))


@pytest.mark.parametrize("levels", [[1.0], [0.0]])
def test_a_schedule_without_a_step(model, levels):
    """'SplitSigmas' at the first or last step gives one."""
    def run(patcher):
        guider = CFGGuider(patcher)
        guider.set_conds(*CONDS)
        return guider.sample(joint(2, 2, 2, seed=2), joint(2, 2, 2, seed=1), make_sampler("euler"),
                             torch.tensor(levels), disable_pbar=True)

    if levels == [1.0]:  # nothing of the clip is in the latent yet, and core would divide by 0
        with pytest.raises(ValueError, match="SplitSigmas"):
            run(set_step_cache(model, ANYTHING))
    else:
        assert_pair_equal(run(set_step_cache(model, ANYTHING)), run(model))


def test_a_second_node_replaces_the_first(model):
    lines = []
    twice = set_step_cache(set_step_cache(model, ANYTHING, lines.append), Settings(0.0, 0.0, 0.0, 1.0), lines.append)
    sample(twice)
    assert lines == ["skipped 0 of 8 passes through the model"]


def test_the_report_counts_calls(model):
    lines = []
    with Batches(model) as passes:
        sample(set_step_cache(model, ANYTHING, lines.append), steps=10)
    assert lines == [f"skipped {10 - len(passes)} of 10 passes through the model"] and len(passes) < 10


def test_windows_that_moved_on_are_forgotten():
    """Otherwise a schedule that moves its windows would keep every one of a sampling."""
    cache = StepCache(ANYTHING, torch.linspace(1, 0, 11))
    x, entry = noise(1, 1, 30, seed=3), {"uuid": 1}

    def step(sigma, options):
        cache.choose([[entry], None], x, torch.tensor([sigma]), options)
        cache.record((1, options["context_window"].index_list, ()), x, x, torch.ones(1, 1, 1), 20)

    class Window:
        def __init__(self, *index_list):
            self.index_list = index_list

    for i, sigma in enumerate(torch.linspace(1, 0, 11)[:-1].tolist()):
        for start in (i, i + 1):
            step(sigma, {"context_window": Window(start, start + 1)})
    assert len(cache.predictions) <= 4
