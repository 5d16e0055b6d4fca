"""Schedules and solvers: the oracle against the reference's tables, the pack against the oracle everywhere else."""

import json
import math

import pytest
import torch
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    BasicScheduler,
    RandomNoise,
    SamplerCustomAdvanced,
    SplitSigmas,
)
from ovi_native.nodes.sampling import OviSchedule, OviSolver
from ovi_native.ovi_model.sampling import solvers
from safetensors.torch import load_file
from support import oracle
from support.parity_items.schedules import ClosedFormModel
from tiny.compare import assert_pair_equal, relative_l2
from tiny.inputs import conditioning, joint
from tiny.models import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def as_float32(values: list[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float32).tolist()


def velocity_of(data: dict):
    """The goldens' linear velocity A x + b t / 1000 in float64."""
    a, b = data["A"].double(), data["b"].double()
    return lambda x, t: torch.einsum("ij,bjn->bin", a, x) + b * (t / 1000)


def linear_model(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"A": 0.3 * torch.randn(4, 4, generator=generator, dtype=torch.float64),
            "b": torch.randn(4, 6, generator=generator, dtype=torch.float64),
            "x0": torch.randn(1, 4, 6, generator=generator, dtype=torch.float64)}


# --- schedules --------------------------------------------------------------------------------------------------------

def test_the_oracle_has_the_reference_schedules(golden):
    entries = json.loads((golden / "schedulers" / "tables.json").read_text())["entries"]
    assert {entry["solver"] for entry in entries} == set(solvers.SOLVERS)
    for entry in entries:
        sigmas, times = oracle.schedule(entry["solver"], entry["steps"], entry["shift"])
        assert sigmas == pytest.approx(entry["sigmas"], rel=1e-6, abs=1e-9)
        assert times == pytest.approx(entry["timesteps"], rel=1e-6 if entry["solver"] == "euler" else 0)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_schedules_of_any_length_and_shift(solver):
    for steps in (1, 2, 3, 7, 20, 33, 50, 101):
        for shift in (0.5, 1.0, 3.0, 5.0, 8.7, 17.3):
            sigmas = solvers.make_sigmas(solver, steps, shift)
            expected, times = oracle.schedule(solver, steps, shift)
            assert sigmas.dtype == torch.float32 and sigmas.tolist() == pytest.approx(expected, rel=1e-6)
            if solver != "euler":
                found = solvers.whole_timesteps(solver, sigmas.tolist())
                for a, b, sigma in zip(found, times, expected[:-1], strict=True):
                    on_the_edge = abs(1000 * sigma - round(1000 * sigma)) < 1e-9
                    assert a == b or (on_the_edge and abs(a - b) == 1), (steps, shift, sigma)


def test_denoise_keeps_the_end_of_a_longer_schedule():
    for solver in solvers.SOLVERS:
        assert torch.equal(solvers.make_sigmas(solver, 10, 5.0, 0.5), solvers.make_sigmas(solver, 20, 5.0)[-11:])
        assert solvers.make_sigmas(solver, 10, 5.0, 0.0).numel() == 0


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("heun", 10), "Unknown solver 'heun'. Choose one of: unipc, dpm\\+\\+, euler"),
    (("unipc", 0), "at least 1 step.*got 0 steps"), (("euler", 5, 0.0), "shift above 0.*shift 0.0"),
    (("dpm++", 5, -1.0), "shift -1.0"),
])
def test_impossible_schedules_get_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        solvers.make_sigmas(*arguments)
    if arguments[0] == "heun":
        with pytest.raises(ValueError, match=sentence):
            solvers.make_sampler("heun")


def test_whole_timesteps_of_a_strange_schedule_are_truncated():
    assert solvers.whole_timesteps("unipc", [0.87499, 0.5, 0.1234, 0.0]) == [874, 500, 123]
    assert solvers.whole_timesteps("dpm++", [1.0, 0.3]) == [1000]


# --- solvers ----------------------------------------------------------------------------------------------------------

def test_the_oracle_steps_like_the_reference(golden):
    """Final states of all stored trajectories; the reference's noise levels are float32."""
    data = load_file(golden / "schedulers" / "trajectories.safetensors")
    runs = [name for name in data if name.endswith(".f64")]
    assert len(runs) == 18
    for name in runs:
        solver, shift, steps = name.split(".")[0], *(float(part[5:]) for part in name.split(".")[1:3])
        sigmas, times = oracle.schedule(solver, int(steps), shift)
        found = oracle.SOLVERS[solver](velocity_of(data), data["x0"].double(), as_float32(sigmas), times)
        assert relative_l2(found[0], data[name][-1]) < 2e-6, name


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 25])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.5])
def test_solvers_on_random_linear_models(solver, steps, shift):
    data = linear_model(steps)
    sigmas = solvers.make_sigmas(solver, steps, shift)
    model = ClosedFormModel(data, torch.float64)
    start = model.noise.clone() * (1 if solver == "unipc" else sigmas[0])
    found = solvers.make_sampler(solver).sampler_function(model, start, sigmas, extra_args={}, disable=True)
    _, times = oracle.schedule(solver, steps, shift)
    truth = oracle.SOLVERS[solver](velocity_of(data), data["x0"], sigmas.tolist(), times)
    assert relative_l2(found, truth) < 1e-6


@pytest.mark.parametrize("shift", [5.0, 0.5])
def test_unipc_starts_from_pure_noise_whatever_core_scaled_it_to(shift):
    data, sigmas = linear_model(1), solvers.make_sigmas("unipc", 4, shift)
    function = solvers.make_sampler("unipc").sampler_function
    results = []
    for scale in (1.0, 0.5):
        model = ClosedFormModel(data, torch.float64)
        results.append(function(model, scale * model.noise, sigmas, extra_args={}, disable=True))
    assert torch.equal(*results)
    low = sigmas[2:]  # from the middle of a schedule the given state counts
    model = ClosedFormModel(data, torch.float64)
    assert not torch.equal(function(model, model.noise, low, extra_args={}, disable=True),
                           function(model, 0.5 * model.noise, low, extra_args={}, disable=True))


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_the_callback_sees_every_step_once(model, solver):
    seen = []
    guider = BasicGuider.execute(model, conditioning()).result[0]
    latent = joint()
    guider.sample(RandomNoise.execute(1).result[0].generate_noise({"samples": latent}), latent,
                  solvers.make_sampler(solver), solvers.make_sigmas(solver, 4),
                  callback=lambda i, x0, x, total: seen.append((i, total, x0.shape, x.shape)), disable_pbar=True)
    shape = latent.unbind()[0].shape
    assert seen == [(i, 4, shape, shape) for i in range(4)]


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("scheduler", ["simple", "normal", "beta", "kl_optimal"])
def test_solvers_on_stock_schedules(model, solver, scheduler):
    """Schedules that start at exactly 1 have an infinite log-SNR there."""
    sigmas = BasicScheduler.execute(model, scheduler, 4, 1.0).result[0]
    out = run(model, solver, sigmas)
    assert all(torch.isfinite(stream).all() for stream in out.unbind())


def run(model, solver, sigmas, seed=1):
    return SamplerCustomAdvanced.execute(
        RandomNoise.execute(seed).result[0], BasicGuider.execute(model, conditioning()).result[0],
        OviSolver.execute(solver).result[0], sigmas, {"samples": joint()}).result[0]["samples"]


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_part_of_a_schedule_ends_at_its_last_level(model, solver):
    """Without a final 0 the result is still noisy, and finite."""
    high, _ = SplitSigmas.execute(OviSchedule.execute(solver, 6, 5.0, 1.0).result[0], 3).result
    out = run(model, solver, high)
    assert all(torch.isfinite(stream).all() and math.isfinite(stream.std()) for stream in out.unbind())


def test_an_empty_schedule_returns_the_latent(model):
    assert_pair_equal(run(model, "unipc", OviSchedule.execute("unipc", 4, 5.0, 0.0).result[0]), joint())
