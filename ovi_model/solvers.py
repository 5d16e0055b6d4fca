"""The three schedules and solvers Ovi was released with, as ComfyUI SIGMAS and SAMPLER.

Ovi predicts a flow velocity: x_sigma = (1 - sigma) * clean + sigma * noise. UniPC (arXiv 2302.04867, B(h) = e^h - 1,
order 2) and DPM-Solver++ (arXiv 2211.01095, 2M midpoint) integrate in lambda = log((1 - sigma) / sigma); core's
solvers of the same names use -log sigma and end up 1e-2 away. All three work on the model's clean estimate, which is
what ComfyUI's wrapped model returns, so masks, guidance and previews are core's.

The network was always fed whole timesteps with UniPC and DPM-Solver++, fractional ones with Euler.
"""

import math

import comfy.samplers
import numpy as np
import torch
from comfy.k_diffusion.sampling import sample_euler
from comfy.utils import model_trange
from torch import Tensor

SOLVERS = ("unipc", "dpm++", "euler")
UNIPC_MAX_SIGMA = float(np.float32(0.999))
"""Where UniPC's schedule starts, before the shift: 1 - 1 / 1000 training steps, in float32 as upstream."""


def make_sigmas(solver: str, steps: int, shift: float = 5.0, denoise: float = 1.0) -> Tensor:
    """Return the noise levels [steps + 1] (float32, ending in 0) the reference uses with `solver`.

    denoise < 1 keeps only the last `steps` levels of a schedule of steps / denoise, as ComfyUI's schedulers do.
    Raises ValueError for an unknown solver, fewer than 1 step, or a shift of 0 or less.
    """
    check_solver(solver)
    if steps < 1 or shift <= 0:
        raise ValueError(f"A schedule needs at least 1 step and a shift above 0; got {steps} steps and shift {shift}.")
    if denoise > 1:
        raise ValueError(f"denoise is the share of the schedule that is run, from 0 to 1; got {denoise}.")
    if denoise <= 0:
        return torch.zeros(0)
    total = max(steps, int(steps / denoise))
    levels = reference_levels(solver, total, shift)
    return torch.tensor([*levels, 0.0][-(steps + 1):], dtype=torch.float32)


def reference_levels(solver: str, steps: int, shift: float) -> list[float]:
    """The reference's noise levels [steps] in float64, without the final 0."""
    if solver == "euler":
        # The lower end is shifted twice, so the last level is about 0.024 whatever the number of steps (shift 5).
        levels = np.linspace(1.0, shifted(1 / 1000, shift), steps)
    else:
        levels = np.linspace(UNIPC_MAX_SIGMA if solver == "unipc" else 1.0, 0.0, steps + 1)[:-1]
    return shifted(levels, shift).tolist()


def shifted(sigma, shift: float):
    """Move noise levels towards 1: `shift * sigma / (1 + (shift - 1) * sigma)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def whole_timesteps(solver: str, sigmas: list[float]) -> list[int]:
    """The whole timesteps the reference feeds the network at float32 noise levels `sigmas` (ending in 0).

    It truncates 1000 times the float64 levels, whose rounding decides at whole numbers (874.9999 becomes 874); float32
    has lost that. So a schedule of the reference's is computed again; another one is truncated as it is.
    """
    exact = recognise(solver, sigmas)
    return [int(1000 * level) for level in exact] if exact else [int(1000 * level + 1e-4) for level in sigmas[:-1]]


def recognise(solver: str, sigmas: list[float]) -> list[float] | None:
    """The float64 levels of the full reference schedule that float32 `sigmas` (ending in 0) are; None if they are none.

    The shift is read off the second level, to three decimals.
    """
    steps, levels = len(sigmas) - 1, sigmas[:-1]
    if steps < 2 or sigmas[-1] != 0:
        return None
    middle = reference_levels(solver, steps, 1.0)[1]
    shift = levels[1] * (1 - middle) / (middle * (1 - levels[1])) if levels[1] < 1 else 1.0
    exact = reference_levels(solver, steps, round(shift, 3))
    return exact if np.array_equal(np.float32(exact), np.float32(levels)) else None


def check_solver(solver: str) -> None:
    """Raise ValueError unless `solver` is one of SOLVERS."""
    if solver not in SOLVERS:
        raise ValueError(f"Unknown solver '{solver}'. Choose one of: {', '.join(SOLVERS)}.")


def log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), infinite at both ends."""
    if sigma <= 0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1 else -math.inf


def make_sampler(solver: str) -> comfy.samplers.KSAMPLER:
    """Return a SAMPLER that reproduces the reference's solver. Raises ValueError for an unknown name."""
    check_solver(solver)
    functions = {"unipc": sample_unipc, "dpm++": sample_dpmpp_2m, "euler": sample_euler}
    return comfy.samplers.KSAMPLER(functions[solver])


class Denoiser:
    """Clean estimates from ComfyUI's wrapped model, with the timesteps the reference would feed the network."""

    def __init__(self, model, solver: str, levels: list[float], extra_args: dict):
        self.model, self.extra_args = model, extra_args
        self.timesteps = whole_timesteps(solver, levels)

    def __call__(self, x: Tensor, sigma: Tensor, step: int) -> Tensor:
        options = self.extra_args.get("model_options", {})
        # A tensor, not a number: a compiled model would be compiled again for every new number.
        timestep = torch.full((), self.timesteps[step], dtype=torch.int64, device=x.device)
        transformer_options = {**options.get("transformer_options", {}), "ovi_timestep": timestep}
        args = {**self.extra_args, "model_options": {**options, "transformer_options": transformer_options}}
        return self.model(x, sigma * x.new_ones([x.shape[0]]), **args)


def unipc_predict(x, sigma, next_sigma, clean, previous):
    """Advance x from sigma to next_sigma (UniP). previous: (sigma, clean) one step back, or None for order 1."""
    if next_sigma == 0:
        return clean
    h = log_snr(next_sigma) - log_snr(sigma)
    phi = math.expm1(-h)
    x = (next_sigma / sigma) * x - (1 - next_sigma) * phi * clean
    if previous is not None:
        r = (log_snr(previous[0]) - log_snr(sigma)) / h
        x = x - (1 - next_sigma) * phi * 0.5 * (previous[1] - clean) / r
    return x


def unipc_correct(x, sigma, now, now_clean, clean, previous):
    """Redo the step from (x, sigma) to `now`, knowing the estimate now_clean there (UniC).

    clean: the estimate at sigma; previous: (sigma, clean) one step further back, or None for order 1.
    """
    h = log_snr(now) - log_snr(sigma)
    phi = math.expm1(-h)
    base = (now / sigma) * x - (1 - now) * phi * clean
    if previous is None:
        return base - (1 - now) * phi * 0.5 * (now_clean - clean)
    r = (log_snr(previous[0]) - log_snr(sigma)) / h
    phi_2 = phi / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / phi, 2 * phi_3 / phi
    rho_1 = (b_2 - b_1) / (r - 1)  # solves [[1, 1], [r, 1]] rho = b
    rho_2 = b_1 - rho_1
    return base - (1 - now) * phi * (rho_1 * (previous[1] - clean) / r + rho_2 * (now_clean - clean))


@torch.no_grad()
def sample_unipc(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """UniPC, order 2 with corrector, on the packed latent x; sigmas [n + 1] ending in 0."""
    extra_args = extra_args or {}
    levels = sigmas.tolist()
    if levels[0] >= UNIPC_MAX_SIGMA or recognise("unipc", levels):
        # A full schedule starts from pure noise upstream, although its first level is a little below 1: core scaled it.
        x = model.noise.to(x)
    denoise = Denoiser(model, "unipc", levels, extra_args)
    history: list[tuple[float, Tensor]] = []  # (sigma, clean estimate), newest last
    last_x, order = None, 1
    for i in model_trange(len(levels) - 1, disable=disable):
        sigma, next_sigma = levels[i], levels[i + 1]
        clean = denoise(x, sigmas[i], i)
        if i > 0:
            x = unipc_correct(last_x, levels[i - 1], sigma, clean, history[-1][1], history[-2] if order == 2 else None)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": clean})
        order = min(2, len(levels) - 1 - i, len(history) + 1)
        last_x = x
        x = unipc_predict(x, sigma, next_sigma, clean, history[-1] if order == 2 else None)
        history = [*history[-1:], (sigma, clean)]
    return x


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver++ 2M midpoint on the packed latent x; first and last step are of order 1."""
    extra_args = extra_args or {}
    levels = sigmas.tolist()
    denoise = Denoiser(model, "dpm++", levels, extra_args)
    previous = None
    for i in model_trange(len(levels) - 1, disable=disable):
        sigma, next_sigma = levels[i], levels[i + 1]
        clean = denoise(x, sigmas[i], i)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": clean})
        if next_sigma == 0:
            return clean
        h = log_snr(next_sigma) - log_snr(sigma)
        target = clean
        if previous is not None and math.isfinite(log_snr(previous[0])):
            r = (log_snr(sigma) - log_snr(previous[0])) / h
            target = clean + 0.5 * (clean - previous[1]) / r
        x = (next_sigma / sigma) * x - (1 - next_sigma) * math.expm1(-h) * target
        previous = (sigma, clean)
    return x
