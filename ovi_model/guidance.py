"""Classifier-free guidance with a scale of its own for each stream (upstream `OviFusionEngine.generate`)."""

import math

from comfy.samplers import CFGGuider

from .seam import SKIP_LAYER_KEY


def guide(positive, negative, scale: float):
    """Return `negative + scale * (positive - negative)`; exact on velocities and on clean estimates alike."""
    return negative + scale * (positive - negative)


def set_audio_guidance(model, scale: float):
    """Return a clone of MODEL whose audio stream is guided by `scale` whatever the sampler's cfg says.

    The sampler's cfg then drives the video alone. Works below any CFG guider: it replaces the audio slice of the
    packed result after core has combined the two passes.
    """

    def guide_audio(args):
        denoised, negative = args["denoised"], args["uncond_denoised"]
        if negative is None or args["uncond"] is None:  # nothing to guide away from; core may hand over zeros
            return denoised
        shapes = args["cond"][0]["model_conds"]["latent_shapes"].cond
        video_size = math.prod(shapes[0][1:])
        audio = guide(args["cond_denoised"][..., video_size:], negative[..., video_size:], scale)
        out = denoised.clone()
        out[..., video_size:] = audio
        return out

    model = model.clone()
    model.set_model_sampler_post_cfg_function(guide_audio, disable_cfg1_optimization=True)
    return model


def set_skip_layer(conditioning: list, layer: int) -> list:
    """Return a copy of CONDITIONING whose passes leave out block `layer` in both towers; negative for none."""
    return [[text, {**options, SKIP_LAYER_KEY: layer}] for text, options in conditioning]


def check_skip_layer(model, layer: int) -> None:
    """Raise ValueError if the model has no block of that index."""
    blocks = len(model.model.diffusion_model.blocks)
    if layer >= blocks:
        raise ValueError(f"Skip layer {layer} does not exist: this Ovi model has blocks 0 to {blocks - 1}. "
                         "Choose one of them, or -1 to switch skip-layer guidance off.")


def make_guider(model, positive, negative, video_scale: float, audio_scale: float, skip_layer: int = -1) -> CFGGuider:
    """Return a GUIDER that guides each stream by its own scale and skips one block in the negative pass."""
    check_skip_layer(model, skip_layer)
    guider = CFGGuider(set_audio_guidance(model, audio_scale))
    guider.set_conds(positive, set_skip_layer(negative, skip_layer))
    guider.set_cfg(video_scale)
    return guider


