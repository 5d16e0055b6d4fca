"""What of a clip is given: its picture, its sound or its first frame, from a clip that the renderer made.

What is given stays clean and stands at timestep 0, which a LATENT's noise mask says; so it was trained.
"""

from __future__ import annotations

import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor
from comfy.patcher_extension import WrappersMP
from ovi_native.nodes.latents import OviFirstFrame
from ovi_native.ovi_model.media.audio_vae import encode_mean
from ovi_native.ovi_model.training.objective import mix
from ovi_native.tiny_world.captions import caption
from ovi_native.tiny_world.picture import render_frames
from ovi_native.tiny_world.scenes import Scene
from ovi_native.tiny_world.sound import render_sound

from .evaluate import VARIANT, Models
from .latents import SAMPLES_PER_LATENT, SIZE
from .pool import LONG
from .scores import Clip


def rendered(scene: Scene) -> Clip:
    """The renderer's own clip, 5 s long."""
    return Clip(caption(scene), render_frames(scene, LONG.frames, SIZE),
                render_sound(scene, LONG.audio_latents * SAMPLES_PER_LATENT))


def encoded(models: Models, clip: Clip) -> dict:
    """LATENT of a clip."""
    video = models.video_vae.encode(as_images(clip))
    return {"samples": NestedTensor((video, encode_mean(models.audio_vae, torch.from_numpy(clip.samples)[None, None])))}


def given_stream(models: Models, clip: Clip, stream: str) -> dict:
    """LATENT that holds the 'picture' or the 'sound' of a clip, for a sampler to make the other."""
    kept = ("picture", "sound").index(stream)
    streams, masks = [], []
    for i, (own, empty) in enumerate(zip(encoded(models, clip)["samples"].unbind(),
                                         models.empty(LONG.seconds)["samples"].unbind(), strict=True)):
        streams.append(own if i == kept else empty)  # nothing of the other is there to be seen
        masks.append(torch.full_like(own[:, :1], float(i != kept)))
    return {"samples": NestedTensor(streams), "noise_mask": NestedTensor(masks)}


def given_first_frame(models: Models, clip: Clip) -> dict:
    """LATENT that begins with a clip's first frame."""
    empty = models.empty(LONG.seconds)
    return OviFirstFrame.execute(models.video_vae, as_images(clip)[:1], VARIANT, "crop", empty).result[0]


def as_images(clip: Clip) -> torch.Tensor:
    """IMAGE [T, S, S, 3] of a clip."""
    return torch.from_numpy(clip.frames.copy()).float() / 255


def replacing(model, seed: int):
    """MODEL for which what is given has the other stream's noise level: what one does with networks that were not
    taught better. No timestep says that it is given."""
    model = model.clone()

    def call(apply_model, args: dict):
        x, sigma, conds = args["input"], args["timestep"], dict(args["c"])
        masks = conds.pop("denoise_mask", None), conds.pop("audio_denoise_mask", None)
        random = torch.Generator().manual_seed(seed)
        streams = []
        for part, mask in zip(comfy.utils.unpack_latents(x, conds["latent_shapes"]), masks, strict=True):
            noise = torch.randn(part.shape[1:], generator=random).to(part)
            streams.append(part if mask is None else mix(part, noise, sigma, 1 - mask))
        return apply_model(comfy.utils.pack_latents(streams)[0], sigma, **conds)

    model.set_model_unet_function_wrapper(call)
    return model


def with_own_clock(model):
    """MODEL whose audio tower counts latents, not the video's frames, as rotary positions: the scale of 1 in Ovi's
    ablation."""
    model = model.clone()

    def call(executor, x, timestep, context, options, **conditions):
        video, _ = conditions["rope"]
        audio = executor.class_obj.audio_model.rope_table(x[1].shape[2], 0.0, 1.0, x[1].device)
        return executor(x, timestep, context, options, **(conditions | {"rope": (video, audio)}))

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "own clock", call)
    return model
