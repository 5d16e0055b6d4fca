"""Classifier-free guidance with a scale of its own for each stream.

Upstream: `OviFusionEngine.generate`.
"""

import logging
from collections.abc import Callable

from comfy.model_sampling import ModelSamplingDiscreteFlow
from comfy.samplers import CFGGuider

from ..sampling import stream_guidance
from ..sampling.guidance import check_scale
from ..sampling.stream_guidance import AUDIO_SCALE
from .conditioning import SKIP_LAYER_KEY
from .latents import check_joint_latent, streams_of


def set_audio_guidance(model, scale: float, warn: Callable[[str], None] = logging.warning):
    """Return a clone of MODEL whose sound is guided by `scale` whatever the sampler's cfg says.

    The sampler's cfg then drives the video alone. Works below any CFG guider, also with guidance
    functions of other nodes: each gets the sound with this scale. Raises ValueError unless the
    scale is a number.

    warn: gets a sentence about what a sampling finds odd, see `stream_guidance`.
    """
    check_scale("audio_guidance", scale)
    model = model.clone()
    model.model_options[AUDIO_SCALE] = scale
    if scale != 1:
        model.disable_model_cfg1_optimization()
    stream_guidance.attach(model, warn)
    return model


def set_skip_layer(conditioning: list, layer: int) -> list:
    """Return a copy of CONDITIONING whose passes skip block `layer` in both towers; -1 for none."""
    return [[text, {**options, SKIP_LAYER_KEY: layer}] for text, options in conditioning]


def check_skip_layer(model, layer: int) -> None:
    """Raise ValueError if the model has no block of that index."""
    blocks = len(model.model.diffusion_model.blocks)
    if layer >= blocks:
        raise ValueError(f"Skip layer {layer} does not exist: this Ovi model has blocks 0 to "
                         f"{blocks - 1}. Choose one of them, or -1 to switch skip-layer guidance "
                         "off.")


class JointGuider(CFGGuider):
    """Core's guider, which refuses a latent that is not joint, or empty, before core stumbles."""

    def sample(self, noise, latent_image, *args, **kwargs):
        check_joint_latent([stream.shape for stream in streams_of(latent_image)])
        return super().sample(noise, latent_image, *args, **kwargs)


def check_conditioning(name: str, conditioning: list) -> None:
    """Raise ValueError for a CONDITIONING without an entry: core would estimate zero for it."""
    if not conditioning:
        raise ValueError(f"The {name} conditioning is empty: it holds no prompt. Connect the "
                         f"{name} output of 'Ovi Prompt'.")


def make_guider(model, positive, negative, video_scale: float, audio_scale: float,
                skip_layer: int = -1,
                warn: Callable[[str], None] = logging.warning) -> CFGGuider:
    """Return a GUIDER with a scale for each stream, whose negative pass skips one block.

    Raises ValueError for scales that are no numbers, a block the model lacks or a conditioning
    without an entry.
    """
    check_scale("video_guidance", video_scale)
    check_skip_layer(model, skip_layer)
    check_conditioning("positive", positive)
    check_conditioning("negative", negative)
    guider = JointGuider(set_audio_guidance(model, audio_scale, warn))
    guider.set_conds(positive, set_skip_layer(negative, skip_layer))
    guider.set_cfg(video_scale)
    return guider


def overridden(model, negative, audio_scale: float, skip_layer: int) -> list[str]:
    """One sentence for each setting of an earlier node that `make_guider` replaces by its own."""
    lines = []
    scale = model.model_options.get(AUDIO_SCALE, audio_scale)
    if scale != audio_scale:
        lines.append(f"'Ovi Audio Guidance' with {scale:g} before this node has no effect: its own "
                     f"audio_guidance of {audio_scale:g} is used. Set it here and take that node "
                     "out.")
    layers = {options.get(SKIP_LAYER_KEY, skip_layer) for _, options in negative} - {skip_layer}
    for layer in sorted(layers):
        lines.append(f"'Ovi Skip Layer' with {layer} on the negative before this node has no "
                     f"effect: its own skip_layer of {skip_layer} is used. Set it here and take "
                     "that node out.")
    return lines


def overridden_schedule(model, shift: float) -> list[str]:
    """The same for a node that changed the MODEL's schedule, before one whose own shift decides."""
    patched = model.object_patches.get("model_sampling")
    if patched is None:
        return []
    released = model.model.model_config.sampling_settings["shift"]
    if not isinstance(patched, ModelSamplingDiscreteFlow):
        return ["A node before this one gave the model another kind of schedule "
                f"({type(patched).__name__}, as from 'ModelSamplingFlux' or "
                "'ModelSamplingDiscrete'). Ovi was not trained for it; take that node out."]
    found = getattr(patched, "shift", released)
    return [] if found in (released, shift) else [
        f"A shift of {found:g} from a node before this one (as 'ModelSamplingSD3') has no effect: "
        f"its own shift of {shift:g} is used. Set it here, or use that node with KSampler."]
