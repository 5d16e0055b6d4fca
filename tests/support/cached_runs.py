"""Runs with a step cache, and a watch on what was computed."""

import nodes
import torch
from comfy.patcher_extension import WrappersMP
from ovi_native.nodes.sampling import OviSampler
from ovi_native.ovi_model.sampling.step_cache import Settings
from tiny.compare import relative_l2
from tiny.inputs import conditioning, joint

ANYTHING = Settings(99.0, 99.0, 0.0, 1.0)
CONDS = conditioning(7, 1), conditioning(5, 2, audio_tokens=4)


def sample(model, latent=None, steps=8, seed=5, solver="euler", **options):
    latent = {"samples": joint(2, 2, 2, seed=1) if latent is None else latent, **options}
    return OviSampler.execute(model, *CONDS, latent, seed, steps, solver, 5.0, 4.0, 3.0, -1, 1.0).result[0]["samples"]


def ksampler(model, latent=None, sampler="euler", steps=6):
    latent = {"samples": joint(2, 2, 2, seed=1) if latent is None else latent}
    return nodes.KSampler().sample(model, 5, steps, 4.0, sampler, "simple", *CONDS, latent)[0]["samples"]


class Watch:
    """A clone of MODEL that notes each conditioning's pass as the sampler sees it, and whether it was computed."""

    def __init__(self, model):
        self.seen, self.ran = [], False
        self.model = model.clone()
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", self.see)
        self.model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", self.run)

    def run(self, executor, *args, **conds):
        self.ran = True
        return executor(*args, **conds)

    def see(self, executor, x, t, concat, text, control, options, **conds):
        self.ran = False
        out = executor(x, t, concat, text, control, options, **conds)
        window, parts = options.get("context_window"), len(options["uuids"])
        window = None if window is None else tuple(window.index_list)
        patches = tuple(options.get("patches_replace", {}).get("dit", {}))
        velocities = (x - out) / t.reshape(-1, 1, 1)
        for uuid, sigma, velocity in zip(options["uuids"], t.chunk(parts), velocities.chunk(parts), strict=True):
            self.seen.append(((uuid, window, patches), float(sigma[0]), velocity, self.ran))
        return out

    def check(self) -> int:
        """Every skipped pass must continue the last two velocities computed under its key; how many there were."""
        computed, skipping = {}, 0
        for key, sigma, velocity, ran in self.seen:
            at = computed.setdefault(key, {})
            if ran:
                at[sigma] = velocity  # the last of several at one sigma counts
            else:
                skipping += 1
                (a, first), (b, second) = list(at.items())[-2:]
                assert relative_l2(velocity, torch.lerp(first, second, (sigma - a) / (b - a))) < 1e-4
        return skipping
