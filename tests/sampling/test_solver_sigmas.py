"""Solvers on schedules that are not whole: in parts, reworking a latent, with equal, rising or impossible levels."""

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    BasicScheduler,
    DisableNoise,
    FlipSigmas,
    RandomNoise,
    SamplerCustomAdvanced,
    SplitSigmas,
)
from comfy_extras.nodes_model_advanced import ModelNoiseScale
from ovi_native.nodes.sampling import OviSolver
from ovi_native.ovi_model.sampling import solvers
from tiny.compare import assert_pair_close, assert_pair_equal, relative_l2
from tiny.inputs import conditioning, first_frame_mask, joint
from tiny.models import tiny_model

SOLVERS = pytest.mark.parametrize("solver", solvers.SOLVERS)
ZEROS, CONTENT = joint(), joint(seed=3)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def run(model, solver, sigmas, samples=ZEROS, noise=True, mask=None, sampler=None):
    """SamplerCustomAdvanced's LATENT, from random noise or from none."""
    latent = {"samples": samples} | ({} if mask is None else {"noise_mask": mask})
    noise = (RandomNoise.execute(1) if noise else DisableNoise.execute()).result[0]
    guider = BasicGuider.execute(model, conditioning()).result[0]
    sampler = sampler or OviSolver.execute(solver).result[0]
    return SamplerCustomAdvanced.execute(noise, guider, sampler, torch.as_tensor(sigmas), latent).result[0]["samples"]


def in_parts(model, solver, sigmas, step, **options):
    high, low = SplitSigmas.execute(sigmas, step).result
    middle = run(model, solver, high, **options)
    return run(model, solver, low, **{**options, "samples": middle, "noise": False})


def start(model, solver, sigmas, samples=ZEROS, **options):
    """The state [B, 1, n] that the model is asked about first."""
    class Stop(Exception):
        pass

    def look(args):
        seen.append(args["input"].clone())
        raise Stop

    seen = []
    looking = model.clone()
    looking.set_model_unet_function_wrapper(lambda _, args: look(args))
    with pytest.raises(Stop):
        run(looking, solver, sigmas, samples, **options)
    return seen[0]


# --- in parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, shift, tolerance", [  # what is left is the step that a new part has forgotten
    ("euler", 5.0, 2e-6), ("euler", 30.0, 2e-6), ("dpm++", 5.0, 0.2), ("unipc", 5.0, 0.2)])
def test_a_schedule_in_two_parts_comes_out_like_one(model, solver, shift, tolerance):
    sigmas = solvers.make_sigmas(solver, 6, shift)
    whole = run(model, solver, sigmas)
    for step in range(1, 6):
        assert_pair_close(in_parts(model, solver, sigmas, step), whole, tolerance)


@SOLVERS
def test_a_part_above_0_999_goes_on_from_its_latent(model, solver):
    """E1 of the reports: unipc began again from zeros there."""
    sigmas = solvers.make_sigmas(solver, 40, 30.0)
    assert sigmas[1] >= 0.999
    assert_pair_close(in_parts(model, solver, sigmas, 1), run(model, solver, sigmas), 5e-5)


@SOLVERS
def test_a_second_part_is_a_fresh_start_from_what_core_hands_over(model, solver):
    """Multistep memory cannot cross a LATENT; everything else does: the same as the solver called on that state."""
    sigmas = solvers.make_sigmas(solver, 6)
    middle = run(model, solver, sigmas[:4])
    stock = comfy.samplers.ksampler("euler")
    low = sigmas[3:5]  # one step: of order 1, which is Euler's in all three
    assert_pair_close(run(model, solver, low, middle, noise=False),
                      run(model, solver, low, middle, noise=False, sampler=stock), 0.02)
    expected = middle.unbind()[1] * (1 - sigmas[3])
    seen = start(model, solver, sigmas[3:], middle, noise=False)
    torch.testing.assert_close(seen[..., -expected[0].numel():].flatten(), expected.flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 100.0), (6, 5.0), (6, 3.14159), (6, 0.5), (40, 30.0),
                                          (50, 100.0), (1000, 5.0)])
def test_unipc_starts_from_pure_noise_in_a_whole_schedule_and_its_beginning(model, steps, shift):
    sigmas = solvers.make_sigmas("unipc", steps, shift)
    noise = RandomNoise.execute(1).result[0].generate_noise({"samples": ZEROS})
    pure = torch.cat([stream.flatten() for stream in noise.unbind()])
    assert torch.equal(start(model, "unipc", sigmas).flatten(), pure)
    assert torch.equal(start(model, "unipc", sigmas, CONTENT).flatten(), pure)
    if steps > 2 and shift == round(shift, 1) and shift <= 30:
        for step in (1, steps // 2, steps - 1):
            assert torch.equal(start(model, "unipc", sigmas[:step + 1]).flatten(), pure), step


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_schedules_are_recognised_at_any_shift(solver):
    """It decides the timesteps; the second level alone does not tell a large shift."""
    for steps in (2, 3, 7, 50, 1000):
        for shift in (0.1, 1.0, 5.0, 17.3, 43.7, 99.9, 100.0):
            levels = solvers.make_sigmas(solver, steps, shift).tolist()
            assert solvers.recognise(solver, levels) == solvers.reference_sigmas(solver, steps, shift), (steps, shift)
            assert not solvers.recognise(solver, levels[1:])


def test_other_starts_of_unipc_are_core_s(model):
    """denoise below 1, a later part with new noise, a stock schedule: the latent counts with its share."""
    for sigmas in (solvers.make_sigmas("unipc", 4, 5.0, 0.5), solvers.make_sigmas("unipc", 40, 30.0)[1:],
                   torch.tensor([0.9993, 0.5, 0.0])):
        with_content, without = start(model, "unipc", sigmas, CONTENT), start(model, "unipc", sigmas)
        assert torch.equal(with_content, start(model, "euler", sigmas, CONTENT))
        assert not torch.equal(with_content, without)


@SOLVERS
def test_noise_scale_is_honoured(model, solver):
    sigmas = solvers.make_sigmas(solver, 3)
    halved, = ModelNoiseScale().patch(model, 0.5)
    torch.testing.assert_close(start(halved, solver, sigmas), 0.5 * start(model, solver, sigmas))
    found, truth = run(halved, solver, sigmas), run(model, solver, sigmas)
    assert all(relative_l2(a, b) > 0.1 for a, b in zip(found.unbind(), truth.unbind(), strict=True))


@SOLVERS
def test_batch_of_two_in_parts(model, solver):
    samples, sigmas = joint(batch=2), solvers.make_sigmas(solver, 5)
    found = in_parts(model, solver, sigmas, 2, samples=samples)
    assert_pair_close(found, run(model, solver, sigmas, samples), 0.2)


@SOLVERS
@pytest.mark.parametrize("step", [1, 3])
def test_the_first_frame_stays_clean_over_a_split(model, solver, step):
    sigmas, mask = solvers.make_sigmas(solver, 5), first_frame_mask(CONTENT)
    found = in_parts(model, solver, sigmas, step, samples=CONTENT, mask=mask)
    torch.testing.assert_close(found.unbind()[0][:, :, 0], CONTENT.unbind()[0][:, :, 0], rtol=1e-5, atol=1e-5)
    whole = run(model, solver, sigmas, CONTENT, mask=mask)
    assert_pair_close(found, whole, 2e-6 if solver == "euler" else 0.2)


@SOLVERS
def test_a_wrapper_that_shows_the_model_s_inside_only(model, solver):
    """As packs do that change what the sampler sees: no noise, no latent_image."""
    inner = OviSolver.execute(solver).result[0].sampler_function

    def wrapped(model, x, sigmas, **options):
        def shown(x, sigma, **args):
            return model(x, sigma, **args)

        shown.inner_model, shown.sigmas = model.inner_model, model.sigmas
        return inner(shown, x, sigmas, **options)

    sigmas, mask = solvers.make_sigmas(solver, 3), first_frame_mask(CONTENT)
    sampler = comfy.samplers.KSAMPLER(wrapped)
    assert_pair_close(run(model, solver, sigmas, sampler=sampler), run(model, solver, sigmas), 1e-5)
    assert_pair_close(run(model, solver, sigmas, CONTENT, mask=mask, sampler=sampler),
                      run(model, solver, sigmas, CONTENT, mask=mask), 1e-3)


# --- levels -----------------------------------------------------------------------------------------------------------


@SOLVERS
@pytest.mark.parametrize("levels", [
    [0.9, 0.7, 0.7, 0.3, 0.0], [0.9, 0.9, 0.9, 0.7, 0.3, 0.0], [0.9, 0.7, 0.3, 0.0, 0.0],
    [0.9, 0.7, 0.7, 0.7, 0.3, 0.3, 0.0]])
def test_equal_levels_are_one(model, solver, levels):
    assert_pair_equal(run(model, solver, levels), run(model, solver, [0.9, 0.7, 0.3, 0.0]))


@SOLVERS
def test_levels_a_hair_apart_do_not_blow_rounding_up(model, solver):
    near = float(torch.nextafter(torch.tensor(0.7), torch.tensor(0.0)))
    truth = run(model, solver, [0.9, 0.7, 0.3, 0.0])
    for second in (near, 0.69999, 0.6999):
        assert_pair_close(run(model, solver, [0.9, 0.7, second, 0.3, 0.0]), truth, 0.3)


@SOLVERS
def test_progress_counts_the_schedule_as_given(model, solver):
    seen = []
    guider = BasicGuider.execute(model, conditioning()).result[0]
    noise = RandomNoise.execute(1).result[0].generate_noise({"samples": ZEROS})
    guider.sample(noise, ZEROS, solvers.make_sampler(solver), torch.tensor([0.9, 0.9, 0.7, 0.3, 0.3, 0.0, 0.0]),
                  callback=lambda i, *_: seen.append(i), disable_pbar=True)
    assert seen == [1, 2, 5] or seen == [1, 3, 5]


IMPOSSIBLE = [
    ([0.5, 0.7, 0.0], r"rises from 0\.5 to 0\.7 at step 1"), ([0.0, 0.5, 1.0], "rises from 0 to 0.5"),
    ([0.9, float("nan"), 0.0], "the noise level nan"), ([float("inf"), 0.5, 0.0], "the noise level inf"),
    ([0.9, 0.5, -0.1], r"the noise level -0\.1"), ([14.6, 3.0, 0.0], r"the noise level 14\.6"),
    ([1.0], "ends at noise level 1"), ([1.0, 1.0], "ends at noise level 1"), ([[0.9, 0.0]], r"shape \[1, 2\]"),
]


@SOLVERS
@pytest.mark.parametrize("levels, sentence", IMPOSSIBLE, ids=str)
def test_impossible_levels_are_refused_before_the_first_step(model, solver, levels, sentence):
    asked = []
    watched = model.clone()
    watched.set_model_unet_function_wrapper(lambda f, args: asked.append(1) or f(args["input"], args["timestep"],
                                                                                 **args["c"]))
    guider = BasicGuider.execute(watched, conditioning()).result[0]
    with pytest.raises(ValueError, match=sentence):
        solvers.make_sampler(solver).sampler_function(guider, CONTENT.unbind()[1], torch.tensor(levels))
    if isinstance(levels[0], float):
        with pytest.raises(ValueError, match=sentence):
            run(watched, solver, levels)
    assert not asked


@SOLVERS
def test_flipped_sigmas_are_refused(model, solver):
    with pytest.raises(ValueError, match=r"rises from .* Take out 'FlipSigmas'"):
        run(model, solver, FlipSigmas.execute(solvers.make_sigmas(solver, 4)).result[0])


@SOLVERS
def test_a_single_level_only_mixes_noise_in(model, solver):
    assert_pair_close(run(model, solver, [0.0], CONTENT, noise=False), CONTENT, 1e-6)
    stock = run(model, solver, [0.6], CONTENT, sampler=comfy.samplers.ksampler("euler"))
    assert_pair_close(run(model, solver, [0.6], CONTENT), stock, 1e-6)


@pytest.mark.parametrize("solver, samples", [("euler", CONTENT), ("dpm++", CONTENT), ("unipc", ZEROS)])
def test_neither_noise_nor_latent_is_refused(model, solver, samples):
    """At level 1 the latent has no weight, so that a whole schedule without noise would start from zeros."""
    with pytest.raises(ValueError, match=r"from nothing but zeros.*'RandomNoise' in place of 'DisableNoise'"):
        run(model, solver, solvers.make_sigmas(solver, 3), samples, noise=False)


@SOLVERS
@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_stock_schedule_of_the_model_runs(model, solver, scheduler):
    out = run(model, solver, BasicScheduler.execute(model, scheduler, 5, 1.0).result[0])
    assert all(torch.isfinite(stream).all() for stream in out.unbind())


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers, sentence", [
    ((10_001,), "at most 10000; got 10001 steps"), ((10**12,), "got 1000000000000 steps"), ((-1,), "got -1 steps"),
    ((5, float("nan")), "shift nan"), ((5, float("inf")), "shift inf"), ((5, 1e6), "to 1000; got shift 1000000"),
    ((5, 5.0, float("nan")), "from 0 to 1; got nan"), ((5, 5.0, -0.1), r"got -0\.1"), ((5, 5.0, 1.1), r"got 1\.1"),
    ((5, 5.0, 1e-12), r"denoise 1e-12 with 5 steps is the end of a schedule of 5e\+12 steps"),
])
@SOLVERS
def test_numbers_no_schedule_can_be_made_of(solver, numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        solvers.make_sigmas(solver, *numbers)


@SOLVERS
@pytest.mark.parametrize("shift", [0.001, 1000.0])
def test_extreme_shifts_are_finite(model, solver, shift):
    out = run(model, solver, solvers.make_sigmas(solver, 4, shift))
    assert all(torch.isfinite(stream).all() for stream in out.unbind())
