"""Sampling runs of the whole MODEL, and what they call the network with."""

from comfy.context_windows import ContextFuseMethods, ContextSchedules
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    DisableNoise,
    RandomNoise,
    SamplerCustomAdvanced,
)
from ovi_native.ovi_model.sampling import solvers
from tiny.inputs import conditioning
from tiny.models import network

LENGTH, OVERLAP = 4, 2  # of a context window, in video latent frames


def sample(model, latent, sigmas=None, mask=None, solver="euler", steps=2, seed=3, guider=None, keep_noise=True):
    """Run SamplerCustomAdvanced on a joint latent; returns the nested result."""
    guider = guider or BasicGuider.execute(model, conditioning(7, 1)).result[0]
    sigmas = solvers.make_sigmas(solver, steps) if sigmas is None else sigmas
    given = {"samples": latent} if mask is None else {"samples": latent, "noise_mask": mask}
    noise_source = (RandomNoise.execute(seed) if keep_noise else DisableNoise.execute()).result[0]
    return SamplerCustomAdvanced.execute(noise_source, guider, solvers.make_sampler(solver), sigmas, given).result[0][
        "samples"]


class Calls:
    """What the network is called with while sampling."""

    def __init__(self, model):
        self.network, self.list = network(model), []

    def __enter__(self):
        self.handle = self.network.register_forward_pre_hook(self.note, with_kwargs=True)
        return self.list

    def note(self, _, args, kwargs):
        x = args[0]
        self.list.append({"video": x[0].clone(), "audio": x[1].clone(), "t": args[1].clone(), **kwargs})

    def __exit__(self, *_):
        self.handle.remove()


def windowed(model, length=LENGTH, overlap=OVERLAP, schedule=ContextSchedules.STATIC_STANDARD, stride=1, closed=False,
             fuse=ContextFuseMethods.PYRAMID, freenoise=False, causal=True, **options):
    return ContextWindowsManualNode.execute(
        model, length, overlap, schedule, stride, closed, fuse, 2, freenoise, causal_window_fix=causal, **options
    ).result[0]
