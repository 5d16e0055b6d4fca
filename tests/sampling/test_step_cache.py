"""'Ovi Step Cache': what it skips, on what grounds, and that nothing of one sampling reaches another."""

import comfy.multigpu
import pytest
import torch
from comfy.context_windows import ContextFuseMethods, ContextSchedules
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import DualModelGuider
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.sampling.guidance import step_range
from ovi_native.ovi_model.sampling.solvers import make_sampler
from ovi_native.ovi_model.sampling.step_cache import (
    MAX_IN_A_ROW,
    CachedPrediction,
    Settings,
    StepCache,
    norms,
    sampled_share,
    set_step_cache,
)
from support.cached_runs import ANYTHING, CONDS, Watch, ksampler, sample
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, assert_pair_equal, relative_l2
from tiny.inputs import first_frame_mask, joint, noise
from tiny.models import Batches, load, write_checkpoint
from tiny.sizes import Sizes
from torch._subclasses import FakeTensorMode

ONE = torch.ones(1, 1, 1)
@pytest.fixture(scope="module")
def model():
    return load(draw_weights(Sizes(blocks=2)))


# --- what is skipped --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [Settings(0.0, 0.0, 0.0, 1.0), Settings(99.0, 0.0, 0.0, 1.0),
                                      Settings(0.0, 99.0, 0.0, 1.0)], ids=["both", "audio", "video"])
def test_a_threshold_of_nothing_on_either_stream_changes_nothing(model, settings):
    with Batches(model) as passes:
        found = sample(set_step_cache(model, settings))
    assert passes == [2] * 8
    assert_pair_equal(found, sample(model))


def test_first_and_last_steps_are_computed_and_no_more_than_three_in_a_row_skipped(model):
    watch = Watch(set_step_cache(model, ANYTHING))
    sample(watch.model, steps=9)
    order = [ran for key, _, _, ran in watch.seen if key == watch.seen[0][0]]
    assert order == [True, True, *[False] * MAX_IN_A_ROW, True, False, False, True]
    assert watch.check() == 2 * order.count(False)


def test_only_steps_of_the_range_are_skipped(model):
    watch = Watch(set_step_cache(model, Settings(99.0, 99.0, 0.3, 0.6)))
    sample(watch.model, steps=20, solver="unipc")
    order = [ran for key, _, _, ran in watch.seen if key == watch.seen[0][0]]
    assert all(order[:6]) and all(order[12:]) and order[6:12] == [False] * 3 + [True] + [False] * 2


@pytest.mark.parametrize("start, end, expected", [(0.0, 1.0, range(10)), (0.1, 0.9, range(1, 9)), (0.3, 0.31, [3]),
                                                  (0.25, 0.5, [3, 4])])
def test_a_share_of_the_schedule_is_a_share_of_its_steps(start, end, expected):
    for sigmas in (torch.linspace(1, 0, 11), torch.linspace(0.0001, 1, 11)):
        highest, lowest = step_range(sigmas, start, end)
        assert [i for i, sigma in enumerate(sigmas[:-1]) if lowest < sigma <= highest] == list(expected)


# --- on what grounds --------------------------------------------------------------------------------------------------

def computed_pass(video_speed: float, audio_speed: float, clips: int = 1,
                  weights=ONE) -> tuple[CachedPrediction, torch.Tensor]:
    """Two computed passes of a velocity field linear in the latent, at x and 1.1 x; and its velocity there."""
    x = noise(clips, 1, 30, seed=1)
    speed = torch.cat([torch.full((20,), video_speed), torch.full((10,), audio_speed)])
    first = CachedPrediction(1.0, x, 5 + speed * x, 0.0, torch.full((2, clips), float("inf")), 20, 1.0)
    return first.followed_by(1.1 * x, 5 + speed * 1.1 * x, weights, 0.9), 1.1 * x


def test_the_expected_change_is_each_streams_own():
    last, x = computed_pass(2.0, 0.3)
    moved = x + 0.05 * noise(1, 1, 30, seed=2)
    distance, size = norms(moved - x, 20), norms(last.velocity, 20)
    expected = torch.tensor([2.0, 0.3]) * (distance / size)[:, 0]
    assert torch.allclose(last.expected_change(moved), expected, rtol=1e-4)


def test_the_clip_that_changes_most_decides_for_the_batch():
    one, x = computed_pass(2.0, 0.3)
    both = CachedPrediction(0.9, x.repeat(2, 1, 1), one.velocity.repeat(2, 1, 1), 0.0, one.rate.repeat(1, 2), 20, 1.0)
    moved = x + 0.1
    change = both.expected_change(torch.cat([moved, x + 1.0]))
    assert torch.allclose(change, one.expected_change(x + 1.0))
    assert (change > one.expected_change(moved)).all()


def test_a_latent_that_stood_still_tells_nothing_of_the_rate():
    last, x = computed_pass(2.0, 0.3)
    assert torch.equal(last.followed_by(x, last.velocity, ONE, 0.9).rate, last.rate)


def test_a_velocity_linear_in_the_noise_level_is_continued_exactly():
    x, base, derivative = noise(1, 1, 30, seed=1), noise(1, 1, 30, seed=2), noise(1, 1, 30, seed=3)
    first = CachedPrediction(0.8, x, base + 0.8 * derivative, 0.0, torch.full((2, 1), float("inf")), 20, 0.8)
    last = first.followed_by(x + 0.1, base + 0.7 * derivative, ONE, 0.7)
    assert torch.allclose(last.continued(0.4), base + 0.4 * derivative, atol=1e-5)
    again = last.followed_by(x + 0.2, base + 0.6 * derivative, ONE, 0.7)  # as the second call of a step does
    assert torch.equal(again.derivative, last.derivative)


def test_one_pass_alone_is_never_reused(model):
    watch = Watch(set_step_cache(model, ANYTHING))
    ksampler(watch.model, steps=2)
    assert watch.check() == 0


def test_what_is_given_does_not_count():
    """Weights are 0 on a given first frame and on given audio latents, in the layout of the packed latent."""
    shapes = [(1, 48, 3, 2, 2), (1, 20, 4)]
    video_mask, audio_mask = torch.ones(1, 1, 3, 1, 1), torch.ones(1, 1, 4)
    video_mask[:, :, 0], audio_mask[..., 2:] = 0, 0
    x = noise(2, 1, 48 * 12 + 80)
    weights = sampled_share(x, shapes, video_mask, audio_mask)
    assert weights.shape == x.shape and torch.equal(weights[0], weights[1])
    video, audio = weights[0, :, : 48 * 12].reshape(48, 3, 2, 2), weights[0, :, 48 * 12:].reshape(20, 4)
    assert (video[:, 0] == 0).all() and (video[:, 1:] == 1).all()
    assert (audio[:, :2] == 1).all() and (audio[:, 2:] == 0).all()
    assert torch.equal(sampled_share(x, shapes), torch.ones(2, 1, 1))
    assert (sampled_share(x, shapes, video_mask)[..., 48 * 12:] == 1).all()
    weights = torch.ones(1, 1, 30)
    weights[..., :10] = 0
    diluted, kept = computed_pass(2.0, 0.3)[0], computed_pass(2.0, 0.3, weights=weights)[0]
    assert diluted.rate[1] == kept.rate[1] and diluted.rate[0] != kept.rate[0]


# --- with everything else ---------------------------------------------------------------------------------------------

def test_image_to_video_in_a_batch(model):
    latent = joint(3, 2, 2, batch=2, seed=4)
    watch = Watch(set_step_cache(model, ANYTHING))
    found = sample(watch.model, latent, noise_mask=first_frame_mask(latent))
    assert watch.check() > 0
    assert relative_l2(found.unbind()[0][:, :, :1], latent.unbind()[0][:, :, :1]) < 1e-5


def test_positive_and_negative_in_passes_of_their_own(model, monkeypatch):
    """As when memory is short: the same decisions, the same result."""
    settings = Settings(1.0, 1.0, 0.0, 1.0)
    with Batches(model) as together:
        expected = sample(set_step_cache(model, settings), steps=12)
    monkeypatch.setattr(model.model, "memory_required", lambda shape, **_: 1e18 if shape[0] > 1 else 0)
    with Batches(model) as apart:
        found = sample(set_step_cache(model, settings), steps=12)
    assert 2 < len(together) < 12 and apart == [1] * 2 * len(together)
    assert_pair_close(found, expected, 1e-4)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "uni_pc"])
def test_samplers_with_several_calls_a_step(model, sampler):
    watch = Watch(set_step_cache(model, ANYTHING))
    out = ksampler(watch.model, sampler=sampler)
    assert watch.check() > 0
    assert all(torch.isfinite(stream).all() for stream in out.unbind())
    exact = set_step_cache(model, Settings(0.0, 0.0, 0.0, 1.0))
    assert_pair_equal(ksampler(exact, sampler=sampler), ksampler(model, sampler=sampler))


@pytest.mark.parametrize("schedule", [ContextSchedules.STATIC_STANDARD, ContextSchedules.UNIFORM_STANDARD])
def test_every_context_window_has_its_own(model, schedule):
    watch = Watch(set_step_cache(model, ANYTHING))
    windowed = ContextWindowsManualNode.execute(
        watch.model, 3, 1, schedule, 1, False, ContextFuseMethods.PYRAMID, 2, False, "", False, "", True).result[0]
    sample(windowed, joint(6, 2, 2, seed=4))
    assert len({key[1] for key, *_ in watch.seen}) > 2
    assert watch.check() > 0


def test_passes_with_a_block_replaced_have_their_own(model):
    """Core's skip-layer guidance runs the positive prompt once more, without block 0."""
    watch = Watch(SkipLayerGuidanceDiT.execute(
        set_step_cache(model, ANYTHING), 3.0, 0.0, 1.0, double_layers="0").result[0])
    ksampler(watch.model)
    assert len({key for key, *_ in watch.seen}) == 3
    assert watch.check() > 0


def test_models_of_their_own_for_positive_and_negative_decide_together(model):
    """Core's guider for two models calls each by itself; what is skipped at a latent is so in both, or in neither."""
    for settings, some in ((ANYTHING, True), (Settings(1.0, 1.0, 0.0, 1.0), True)):
        lines, other = [], load(draw_weights(Sizes(blocks=2), seed=3))
        cached = set_step_cache(model, settings, lines.append)
        guider = DualModelGuider.execute(cached, CONDS[0], 4.0, other, CONDS[1]).result[0]
        with Batches(model) as positive, Batches(other) as negative:
            guider.sample(joint(2, 2, 2, seed=2), joint(2, 2, 2, seed=1), make_sampler("euler"),
                          torch.linspace(1, 0, 11), disable_pbar=True)
        assert len(positive) == len(negative) and (len(positive) < 10) == some
        assert lines == [f"skipped {10 - len(positive)} of 10 passes through the model"]


@pytest.mark.parametrize("way", ["wrapper", "function"])
def test_a_pass_whose_batch_is_divided_is_computed(model, way):
    """Another pack's wrapper hands on one row at a time, with the options of the whole batch."""
    def rows(apply, x, t, conds):
        def row(value, i):
            return value[i:i + 1] if torch.is_tensor(value) and len(value) == len(x) else value
        return torch.cat([apply(x[i:i + 1], t[i:i + 1], {key: [value[i]] if key == "skip_layers" else row(value, i)
                                                         for key, value in conds.items()}) for i in range(len(x))])

    def wrapper(executor, x, t, concat, text, control, options, **conds):
        return rows(lambda x, t, c: executor(x, t, concat, c.pop("text"), control, options, **c), x, t,
                    {**{key: value for key, value in conds.items() if key != "text_names"}, "text": text})

    def function(apply, args):
        conds = {key: value for key, value in args["c"].items() if key != "text_names"}
        return rows(lambda x, t, c: apply(x, t, **c), args["input"], args["timestep"], conds)

    def dividing(m):
        m = m.clone()
        if way == "wrapper":
            m.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "divide", wrapper)
        else:
            m.set_model_unet_function_wrapper(function)
        return m

    lines = []
    found = sample(dividing(set_step_cache(model, ANYTHING, lines.append)))
    assert_pair_equal(found, sample(dividing(model)))
    assert lines == ["skipped 0 of 8 passes through the model (another node divides the batches, and such passes "
                     "are always computed)"]


def test_two_devices_decide_together(tmp_path):
    patcher, _ = checkpoint.load_model(str(write_checkpoint(tmp_path)), None)
    settings = Settings(1.0, 1.0, 0.0, 1.0)
    with Batches(patcher) as passes:
        alone = sample(set_step_cache(patcher, settings))
    second = patcher.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    second.is_multigpu_base_clone = True
    split = set_step_cache(patcher, settings)
    split.set_additional_models("multigpu", [second])
    split.match_multigpu_clones()
    comfy.multigpu.GPUOptionsGroup().register(split)
    with Batches(patcher) as first_passes, Batches(second) as second_passes:
        together = sample(split)
    assert 2 < len(passes) < 8 and first_passes == second_passes == [1] * len(passes)
    assert_pair_close(together, alone, 1e-4)


def test_a_pass_that_core_gives_to_another_gpu_is_continued_there():
    """As when a prompt's range ends and the remaining ones are divided anew."""
    cache = StepCache(ANYTHING, torch.linspace(1, 0, 11))
    cache.sigma = 0.5
    with FakeTensorMode():
        x = torch.empty(1, 1, 30, device="cuda:0")
        for uuid, device in ((1, "cuda:0"), (2, "cuda:1")):
            velocity = x.to(device)
            cache.predictions[uuid, None, ()] = CachedPrediction(
                0.6, velocity, velocity, velocity, velocity.new_ones(2, 1), 20, 0.6)
        cache.skipping, cache.subject = set(cache.predictions), (x, None, None)
        out = cache.on_pass(None, torch.cat([x, x]), x.new_full((2,), 0.5), transformer_options={"uuids": [1, 2]})
    assert out.shape == (2, 1, 30) and out.device == torch.device("cuda:0")


def test_with_easycache_around_it(model):
    both = EasyCacheNode.execute(set_step_cache(model, ANYTHING), 0.2, 0.0, 1.0, False).result[0]
    with Batches(model) as passes:
        out = sample(both)
    assert len(passes) < 8 and all(torch.isfinite(stream).all() for stream in out.unbind())
