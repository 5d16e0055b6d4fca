"""The schedules and solvers that joint flow models were released with, as SIGMAS and SAMPLER.

The network predicts a flow velocity: x_sigma = (1 - sigma) * denoised + sigma * noise. UniPC (arXiv
2302.04867, B(h) = e^h - 1, order 2) and DPM-Solver++ (arXiv 2211.01095, 2M midpoint) integrate in
lambda = log((1 - sigma) / sigma); core's solvers of the same names use -log sigma and end up 1e-2
away. All three work on the model's denoised estimate, which is what ComfyUI's wrapped model
returns, so masks, guidance and previews are core's.

"The reference" is Ovi's own inference code. It always feeds whole timesteps to the network with
UniPC and DPM-Solver++, fractional ones with Euler.

A schedule may be run in parts (SplitSigmas, then DisableNoise). Euler is the same in parts as in
one run; the other two remember one step, which a new part has not: it starts as a run of its own.
"""

import functools
import itertools
import math
from collections.abc import Callable

import comfy.samplers
import numpy as np
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.utils import model_trange
from torch import Tensor

SOLVERS = ("unipc", "dpm++", "euler")
UNIPC_MAX_SIGMA = float(np.float32(0.999))
"""Where UniPC's schedule starts, before the shift: 1 - 1 / 1000 training steps, as float32."""
LARGEST_SHIFT = 1000.0
SMALLEST_SHIFT = 0.1  # that a schedule is recognised with; what the nodes offer
MOST_STEPS = 10_000
MOST_SIGMAS = 1_000_000  # of the whole schedule that denoise cuts the end from
ROUNDING = 1e-5  # how far above 1 stock schedules may round
SHORTEST_MEMORY = 0.01
"""A previous step shorter than this share of the present one tells nothing but its rounding."""


def make_sigmas(solver: str, steps: int, shift: float = 5.0, denoise: float = 1.0) -> Tensor:
    """Return the sigmas [steps + 1] (float32, ending in 0) that the reference uses with `solver`.

    denoise < 1 keeps only the last `steps` of a schedule of steps / denoise, as ComfyUI's
    schedulers do. Raises ValueError for an unknown solver and for numbers of no schedule.
    """
    check_solver(solver)
    check_schedule(steps, shift, denoise)
    if denoise == 0:
        return torch.zeros(0)
    total = max(steps, int(steps / denoise))
    sigmas = [*reference_sigmas(solver, total, shift), 0.0]
    return torch.tensor(sigmas[-(steps + 1):], dtype=torch.float32)


def check_schedule(steps: int, shift: float, denoise: float) -> None:
    """Raise ValueError unless a schedule can be made of these numbers.

    NaN and infinity fail every comparison here.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"A schedule needs at least 1 step and at most {MOST_STEPS}; got {steps} "
                         "steps.")
    if not 0.001 <= shift <= LARGEST_SHIFT:
        raise ValueError(f"A schedule needs a shift above 0, from 0.001 to {LARGEST_SHIFT:g}; got "
                         f"shift {shift}. The model was released with 5.")
    if not 0 <= denoise <= 1:
        raise ValueError("denoise is the share of the schedule that is run, from 0 to 1; got "
                         f"{denoise}.")
    if denoise and steps / denoise > MOST_SIGMAS:
        raise ValueError(f"denoise {denoise} with {steps} steps is the end of a schedule of "
                         f"{steps / denoise:.3g} steps, which changes nothing. Use 0.01 or more, "
                         "or 0 for no sampling at all.")


def reference_sigmas(solver: str, steps: int, shift: float) -> list[float]:
    """The reference's sigmas [steps] in float64, without the final 0."""
    if solver == "euler":
        # The lower end is shifted twice: the last is about 0.024 whatever the steps (shift 5).
        sigmas = np.linspace(1.0, shifted(1 / 1000, shift), steps)
    else:
        sigmas = np.linspace(UNIPC_MAX_SIGMA if solver == "unipc" else 1.0, 0.0, steps + 1)[:-1]
    return shifted(sigmas, shift).tolist()


def shifted(sigma, shift: float):
    """Move sigmas towards 1: `shift * sigma / (1 + (shift - 1) * sigma)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def whole_timesteps(solver: str, sigmas: list[float]) -> list[int]:
    """The whole timesteps that the reference feeds the network at float32 `sigmas`, one a step.

    It truncates 1000 times the float64 sigmas, whose rounding decides at whole numbers (874.9999
    becomes 874); float32 has lost that. So a schedule of the reference's is computed again; another
    one is truncated as it is.
    """
    exact = recognise(solver, sigmas) or [sigma + 1e-7 for sigma in sigmas]
    return [int(1000 * sigma) for sigma in exact[:len(sigmas) - 1]]


def recognise(solver: str, sigmas: list[float]) -> list[float] | None:
    """The float64 sigmas, without the final 0, of the reference schedule that float32 ones are.

    sigmas: the whole schedule, ending in 0, or (UniPC only, whose first one tells the shift) the
    beginning of one. The shift is read off one of them and tried with one to three decimals, then
    as it is. Returns None if they are no schedule of the reference's.
    """
    whole = sigmas[-1] == 0
    noisy = sigmas[:-1] if whole else sigmas
    if not noisy or not (whole or solver == "unipc"):
        return None
    if not 0 < noisy[-1] <= noisy[0] < 1 + ROUNDING:
        return None
    first = reference_sigmas(solver, 1, 1.0)[0]
    known, base = (noisy[-1], first / len(noisy)) if whole else (noisy[0], first)
    if known >= 1 or base >= 1:
        return None
    estimate = odds(known) / odds(base)
    for shift in [*(round(estimate, decimals) for decimals in (1, 2, 3)), estimate]:
        if shift < SMALLEST_SHIFT:
            continue
        steps = len(noisy) if whole else steps_of_beginning(noisy, shift)
        exact = reference_sigmas(solver, steps, shift)[:len(noisy)]
        if np.allclose(exact, noisy, rtol=1.5e-7, atol=0):
            return exact
    return None


def odds(sigma: float) -> float:
    """sigma / (1 - sigma), which a shift multiplies."""
    return sigma / (1 - sigma)


def steps_of_beginning(sigmas: list[float], shift: float) -> int:
    """Steps of the whole UniPC schedule that would begin with `sigmas`.

    Before the shift they fall in equal steps.
    """
    fallen = 1 - shifted(sigmas[-1], 1 / shift) / UNIPC_MAX_SIGMA
    steps = (len(sigmas) - 1) / fallen if fallen > 0 else 0
    return round(min(max(steps, len(sigmas)), MOST_STEPS))


def check_solver(solver: str) -> None:
    """Raise ValueError unless `solver` is one of SOLVERS."""
    if solver not in SOLVERS:
        raise ValueError(f"Unknown solver {repr(solver)[:100]}. Choose one of: "
                         f"{', '.join(SOLVERS)}.")


def log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), infinite at both ends."""
    if sigma <= 0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1 else -math.inf


def make_sampler(solver: str) -> comfy.samplers.KSAMPLER:
    """Return a SAMPLER that reproduces the reference's solver.

    Raises ValueError for an unknown name. Sigmas it cannot integrate raise ValueError before the
    model is asked for the first time.
    """
    check_solver(solver)
    functions = {"unipc": sample_unipc, "dpm++": sample_dpmpp_2m, "euler": sample_euler}
    return comfy.samplers.KSAMPLER(guarded(functions[solver]))


# --- what comes in and what goes out --------------------------------------------------------------


def guarded(function: Callable) -> Callable:
    """The sampler function, given falling sigmas only, and keeping masked parts at its end."""

    @functools.wraps(function)
    @torch.no_grad()
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        schedule, kept = check_sigmas(sigmas)
        if len(schedule) > 1:
            check_start(x, schedule[0])
        extra_args = extra_args or {}

        ends = [*kept[1:-1], len(sigmas) - 1]  # where each step ends in what was given

        def report(state: dict) -> None:
            callback({**state, "i": ends[state["i"]] - 1})

        if len(kept) > 1:
            falling = sigmas if len(kept) == len(schedule) else sigmas[kept]
            x = function(model, x, falling, extra_args=extra_args,
                         callback=report if callback else None, disable=disable, **options)
        if schedule[-1] == 0:
            return x
        return keep_masked(model, x, sigmas[-1], extra_args.get("denoise_mask"))

    return sample


def check_sigmas(sigmas: Tensor) -> tuple[list[float], list[int]]:
    """The sigmas as numbers, and the indices of those that fall below the one before.

    Waits for the device once. Raises ValueError for impossible ones.
    """
    if sigmas.ndim != 1 or not len(sigmas):
        raise ValueError("The solver needs a list of noise levels, but SIGMAS has shape "
                         f"{list(sigmas.shape)}. Connect 'Ovi Schedule'.")
    schedule, kept = sigmas.tolist(), [0]
    for level in schedule:
        if not 0 <= level <= 1 + ROUNDING:
            raise ValueError(f"SIGMAS has the noise level {level:g}, but those of a flow model are "
                             "from 0 to 1. Use 'Ovi Schedule', or a stock scheduler with the Ovi "
                             "model connected.")
    schedule = [min(level, 1.0) for level in schedule]
    for i, (level, following) in enumerate(itertools.pairwise(schedule), start=1):
        if following > level:
            raise ValueError(f"SIGMAS rises from {level:g} to {following:g} at step {i}, but this "
                             "solver only removes noise: levels must fall. Take out 'FlipSigmas', "
                             "or put the parts in order.")
        if following < level:
            kept.append(i)
    if schedule[-1] >= 1:
        raise ValueError("SIGMAS ends at noise level 1, where nothing but noise is left to give "
                         "on. Split the schedule at a later step ('SplitSigmas' with step 1 or "
                         "more).")
    return schedule, kept


def check_start(x: Tensor, level: float) -> None:
    """Raise ValueError if there is neither noise nor latent to start from.

    Waits for the device, once a run.
    """
    if level > 0 and not bool(x.any()):
        raise ValueError(f"Sampling starts at noise level {level:.4g} from nothing but zeros: no "
                         "noise was added, and the latent is empty or has no weight at this "
                         "level. Connect 'RandomNoise' in place of 'DisableNoise', or start at a "
                         "lower level with a latent that has content.")


def keep_masked(model, x: Tensor, sigma: Tensor, mask: Tensor | None) -> Tensor:
    """Leave what a mask keeps in a result that is still noisy.

    The next part of the schedule takes it as given.
    At sigma 0 the solvers have come to it by themselves; this is for those above.
    """
    latent = getattr(model, "latent_image", None)  # wrappers of other packs may hide it
    if mask is None or latent is None:
        return x
    sampling = model.inner_model.inner_model.model_sampling
    return torch.where(mask == 0, sampling.noise_scaling(sigma, torch.zeros_like(x), latent), x)


def start_of_reference(model, x: Tensor, sigma: Tensor) -> Tensor:
    """Pure noise, where upstream starts UniPC although its first sigma is a little below 1.

    Core has mixed x as sigma * noise + (1 - sigma) * latent. Where it had no noise to mix in, a run
    goes on from a latent that has its noise already, and x stays.
    """
    noise, latent = getattr(model, "noise", None), getattr(model, "latent_image", None)
    if noise is None or latent is None:  # hidden by a wrapper of another pack
        return x / sigma
    sampling = model.inner_model.inner_model.model_sampling
    start = sampling.noise_scaling(torch.ones_like(sigma), noise, latent).to(x)
    return torch.where(noise == 0, x, start)


# --- the solvers ----------------------------------------------------------------------------------


class Denoiser:
    """ComfyUI's wrapped model, with the timesteps that the reference would feed the network."""

    def __init__(self, model, solver: str, sigmas: list[float], extra_args: dict):
        self.model, self.extra_args = model, extra_args
        self.timesteps = whole_timesteps(solver, sigmas)

    def __call__(self, x: Tensor, sigma: Tensor, step: int) -> Tensor:
        options = self.extra_args.get("model_options", {})
        # A tensor, not a number: a compiled model would be compiled again for every new number.
        timestep = torch.full((), self.timesteps[step], dtype=torch.int64, device=x.device)
        transformer_options = {**options.get("transformer_options", {}), "ovi_timestep": timestep}
        options = {**options, "transformer_options": transformer_options}
        args = {**self.extra_args, "model_options": options}
        return self.model(x, sigma * x.new_ones([x.shape[0]]), **args)


def unipc_predict(x, sigma, next_sigma, denoised, previous):
    """Advance x from sigma to next_sigma (UniP).

    previous: (sigma, denoised) one step back, or None for order 1.
    """
    if next_sigma == 0:
        return denoised
    h = log_snr(next_sigma) - log_snr(sigma)
    phi = math.expm1(-h)
    x = (next_sigma / sigma) * x - (1 - next_sigma) * phi * denoised
    if previous is not None:
        r = (log_snr(previous[0]) - log_snr(sigma)) / h
        x = x - (1 - next_sigma) * phi * 0.5 * (previous[1] - denoised) / r
    return x


def unipc_correct(x, sigma, now, now_denoised, denoised, previous):
    """Redo the step from (x, sigma) to `now`, knowing the estimate now_denoised there (UniC).

    denoised: the estimate at sigma.
    previous: (sigma, denoised) one step further back, or None for order 1.
    """
    h = log_snr(now) - log_snr(sigma)
    phi = math.expm1(-h)
    base = (now / sigma) * x - (1 - now) * phi * denoised
    if previous is None:
        return base - (1 - now) * phi * 0.5 * (now_denoised - denoised)
    r = (log_snr(previous[0]) - log_snr(sigma)) / h
    phi_2 = phi / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / phi, 2 * phi_3 / phi
    rho_1 = (b_2 - b_1) / (r - 1)  # solves [[1, 1], [r, 1]] rho = b
    rho_2 = b_1 - rho_1
    steps = rho_1 * (previous[1] - denoised) / r + rho_2 * (now_denoised - denoised)
    return base - (1 - now) * phi * steps


def remembered(history: list[tuple[float, Tensor]], sigma: float,
               next_sigma: float) -> tuple[float, Tensor] | None:
    """The newest of `history`, (sigma, denoised) pairs, that says how the estimate changes.

    None for order 1.
    Across two sigmas that nearly touch, the difference of the estimates is rounding, which order 2
    would blow up.
    """
    shortest = SHORTEST_MEMORY * (log_snr(next_sigma) - log_snr(sigma))
    long_enough = (past for past in reversed(history)
                   if log_snr(sigma) - log_snr(past[0]) >= shortest)
    return next(long_enough, None)


@torch.no_grad()
def sample_unipc(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """UniPC, order 2 with corrector, on the packed latent x [B, 1, n].

    sigmas [steps + 1] fall at every step.
    """
    extra_args = extra_args or {}
    schedule = sigmas.tolist()
    if recognise("unipc", schedule):
        x = start_of_reference(model, x, sigmas[0])
    denoise = Denoiser(model, "unipc", schedule, extra_args)
    history: list[tuple[float, Tensor]] = []  # (sigma, denoised), newest last
    start = None  # of the step that led here: x, sigma, denoised, and its pair of history
    for i in model_trange(len(schedule) - 1, disable=disable):
        sigma, next_sigma = schedule[i], schedule[i + 1]
        denoised = denoise(x, sigmas[i], i)
        if start is not None:
            last_x, last_sigma, last_denoised, previous = start
            x = unipc_correct(last_x, last_sigma, sigma, denoised, last_denoised, previous)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i],
                      "denoised": denoised})
        start = x, sigma, denoised, remembered(history, sigma, next_sigma)
        x = unipc_predict(x, sigma, next_sigma, denoised, start[3])
        history = [*history[-1:], (sigma, denoised)]
    return x


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver++ 2M midpoint on the packed latent x [B, 1, n].

    The first step, and one to 0, are of order 1.
    """
    extra_args = extra_args or {}
    schedule = sigmas.tolist()
    denoise = Denoiser(model, "dpm++", schedule, extra_args)
    history: list[tuple[float, Tensor]] = []  # (sigma, denoised), newest last
    for i in model_trange(len(schedule) - 1, disable=disable):
        sigma, next_sigma = schedule[i], schedule[i + 1]
        denoised = denoise(x, sigmas[i], i)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i],
                      "denoised": denoised})
        if next_sigma == 0:
            return denoised
        h = log_snr(next_sigma) - log_snr(sigma)
        previous, target = remembered(history, sigma, next_sigma), denoised
        if previous is not None:
            r = (log_snr(sigma) - log_snr(previous[0])) / h  # infinite after 1: order 1
            target = denoised + 0.5 * (denoised - previous[1]) / r
        x = (next_sigma / sigma) * x - (1 - next_sigma) * math.expm1(-h) * target
        history = [*history[-1:], (sigma, denoised)]
    return x
