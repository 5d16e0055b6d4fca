"""A small LoRA, alone and as a hook on a conditioning, and a short run to see what it does."""

import comfy.hooks
import comfy.samplers
import torch
from ovi_native.ovi_model.sampling import solvers
from tiny.inputs import conditioning, joint
from tiny.models import network


def lora(patcher) -> dict[str, torch.Tensor]:
    """On a matrix of each tower."""
    weights = {}
    for name in ("blocks.0.ffn.0", "audio_model.blocks.1.cross_attn.k_fusion"):
        out, into = network(patcher).get_submodule(name).weight.shape
        generator = torch.Generator().manual_seed(out)
        weights[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
        weights[f"diffusion_model.{name}.lora_A.weight"] = 0.02 * torch.randn(4, into, generator=generator)
    return weights


def with_hooks(cond, weights):
    """A conditioning whose LoRA is a hook, as 'Create Hook LoRA' and 'Cond Set Props' make it."""
    group = comfy.hooks.create_hook_lora(lora=weights, strength_model=1.0, strength_clip=0.0)
    return [[tensor, {**options, "hooks": group}] for tensor, options in cond]


def sample(patcher, positive):
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(positive, conditioning(5, 2))
    guider.set_cfg(3.0)
    return guider.sample(joint(3, 4, 4, seed=5), joint(3, 4, 4), solvers.make_sampler("euler"),
                         solvers.make_sigmas("euler", 2), disable_pbar=True, seed=1)
