"""What ComfyUI's BaseModel is told of Ovi: latents, conditioning, dtypes, context windows.

ComfyUI samples a joint latent as one packed tensor [B, 1, n]: the video [B, 48, T, H, W] flattened,
then the audio [B, 20, A]. It asks the model to normalise that tensor before it says how the streams
are shaped, so `process_latent_in` hands back a marked copy and `extra_conds`, the first hook that
knows the shapes, normalises its video part in place.

Two hooks are for other modules. While core samples, `sampling` gives each stream its own guidance
(`sampling/stream_guidance.py`); `_apply_model` hands the network by keyword what it would otherwise
look up in the options, which keeps a compiled network from being compiled again.

Shapes: B clips, n elements of the packed latent, T latent frames, A audio latents, C text channels.
"""

import logging
import math
import weakref

import comfy.conds
import comfy.context_windows
import comfy.model_base
import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ..files.loading import cast_as_declared, own_memory, storages
from ..sampling.packed import check_finite
from ..sampling.patches import PatchPlaces
from ..sampling.stream_guidance import Sampling
from .conditioning import SKIP_LAYER_KEY, TEXT_TOKENS, check_text, lost_tokens, read_texts
from .latents import check_joint_latent, length_disagreement
from .model import AUDIO_ROPE_SCALE, OviModel
from .precision import NO_FLOAT16, safe_dtype
from .towers import fit_text
from .variants import GEOMETRY


class CondOfEach(comfy.conds.CONDConstant):
    """One thing a batch index that is no tensor, so that batching never waits for the device."""

    def __init__(self, cond: list):
        super().__init__(cond)

    def process_cond(self, batch_size, **_):
        return self._copy_with(repeat(self.cond, batch_size))

    def can_concat(self, _other):
        return True

    def concat(self, others):
        return list(self.cond) + [each for other in others for each in other.cond]


def repeat(items: list, batch_size: int) -> list:
    """Repeat a list cyclically to batch_size entries, as core does with tensors."""
    return [items[i % len(items)] for i in range(batch_size)]


class OviBaseModel(comfy.model_base.BaseModel):
    """The fused model behind ComfyUI's MODEL."""

    def __init__(self, model_config, device=None):
        flow = comfy.model_base.ModelType.FLOW
        super().__init__(model_config, flow, device=device, unet_model=OviModel)
        self._awaiting_shapes = None  # weak reference to the packed latent still to be normalised
        self._latent_shapes: list = []  # stream shapes of the sampling in progress

    sampling: Sampling | None = None
    _current_patcher = None

    @property
    def current_patcher(self):
        """The MODEL that samples with this model.

        Core sets it where a sampling begins, and None where it ends.
        """
        return self._current_patcher

    @current_patcher.setter
    def current_patcher(self, patcher):
        if self.sampling is not None:
            self.sampling.end()
        self._current_patcher = patcher
        self.sampling = None if patcher is None else Sampling(self, patcher)

    @property
    def latent_shapes(self) -> list:
        """Shapes of video and audio in the sampling in progress."""
        return self._latent_shapes

    @property
    def patch_places(self) -> PatchPlaces:
        """Where other nodes may patch the network."""
        return PatchPlaces("Ovi", "double_block", len(self.diffusion_model.blocks))

    def length_disagreement(self) -> str | None:
        """One sentence if picture and sound of this sampling do not last equally long."""
        return length_disagreement(*self._latent_shapes)

    def load_model_weights(self, sd, unet_prefix="", assign=False):
        """As core's; what core does not load dynamically gets memory of its own, see `loading`."""
        if assign:
            return super().load_model_weights(sd, unet_prefix, assign=True)
        sources = storages(sd.values())
        cast_as_declared(self.diffusion_model, sd, unet_prefix)
        super().load_model_weights(sd, unet_prefix, assign=True)
        own_memory(self.diffusion_model, sources)
        return self

    def get_dtype_inference(self):
        """As core's, but never float16, which 'ModelComputeDtype' may ask for."""
        dtype = super().get_dtype_inference()
        device = None if self.current_patcher is None else self.current_patcher.load_device
        return safe_dtype(device) if dtype == torch.float16 else dtype

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None,
                     transformer_options={}, **kwargs):  # noqa: B006 (core's signature)
        """As core's, with what the network reads from its options as arguments.

        A compiled network is not compiled again when its options change, only when its arguments
        do.
        """
        kwargs["rope"] = self.diffusion_model.rope_tables(
            kwargs["latent_shapes"], x.device, transformer_options)
        kwargs["shown_timestep"] = transformer_options.get("ovi_timestep")
        return super()._apply_model(
            x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    # latent normalisation: Wan2.2's mean and std on the video, nothing on the audio

    def process_latent_in(self, latent):
        if is_packed(latent):
            latent = latent.clone()
            self._awaiting_shapes = weakref.ref(latent)
            return latent
        return map_video(latent, self.latent_format.process_in)

    def process_latent_out(self, latent):
        if is_packed(latent):
            check_finite(latent, self._latent_shapes)
            streams = comfy.utils.unpack_latents(latent, self._latent_shapes)
            streams[0] = self.latent_format.process_out(streams[0])
            return comfy.utils.pack_latents(streams)[0]
        return map_video(latent, self.latent_format.process_out)

    def _normalise_pending(self, latent_image):
        pending, self._awaiting_shapes = self._awaiting_shapes, None
        if pending is not None and pending() is latent_image:
            clips, shape = latent_image.shape[0], self._latent_shapes[0][1:]
            n = math.prod(shape)
            video = latent_image[:, :, :n].reshape(clips, *shape)  # [B, 48, T, H, W]
            video = self.latent_format.process_in(video)
            latent_image[:, :, :n] = video.reshape(clips, 1, n)

    # conditioning

    def concat_cond(self, **_):
        return None  # Wan2.2's own reads the packed latent as a picture

    def extra_conds(self, **kwargs):
        out = super().extra_conds(**kwargs)
        shapes = check_joint_latent(kwargs.get("latent_shapes"))
        out["latent_shapes"] = comfy.conds.CONDConstant(shapes)
        self._latent_shapes = shapes
        self._normalise_pending(kwargs.get("latent_image"))
        if super().get_dtype_inference() == torch.float16:
            logging.warning(NO_FLOAT16, self.get_dtype_inference())

        text, audio_text = read_texts(kwargs)
        network = self.diffusion_model
        check_text(text, network.text_dim)
        check_text(audio_text, network.audio_model.text_dim)
        for sentence in lost_tokens(text, audio_text):
            logging.warning(sentence)
        out["c_crossattn"] = comfy.conds.CONDRegular(fit_text(text, TEXT_TOKENS))
        out["audio_context"] = comfy.conds.CONDRegular(fit_text(audio_text, TEXT_TOKENS))
        out["skip_layers"] = CondOfEach([int(kwargs.get(SKIP_LAYER_KEY, -1))])

        if kwargs.get("denoise_mask") is not None:
            out |= mask_conds(*comfy.utils.unpack_latents(kwargs["denoise_mask"], shapes))
        return out

    def scale_latent_inpaint(self, *, latent_image, **_):
        return latent_image  # kept frames enter the model clean, at timestep 0

    # context windows

    def map_context_window_to_modalities(self, primary_indices, latent_shapes, dim):
        """A window's frames, and the audio latents played during them: contiguous, all audio."""
        frames, latents = latent_shapes[0][dim], latent_shapes[1][dim]

        def first_latent(frame):
            return latents if frame >= frames else min(round(frame / AUDIO_ROPE_SCALE), latents - 1)

        audio = [a for frame in primary_indices
                 for a in range(first_latent(frame), first_latent(frame + 1))]
        return [primary_indices, audio or [latents - 1]]

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device,
                                       retain_index_list=()):
        if cond_key == "denoise_mask":
            return comfy.context_windows.slice_cond(
                cond_value, window, x_in, device, temporal_dim=2,
                retain_index_list=list(retain_index_list))
        if cond_key == "audio_denoise_mask":
            audio_window = window.get_window_for_modality(1)
            return cond_value._copy_with(audio_window.get_tensor(cond_value.cond, device, dim=2))
        if cond_key in ("c_crossattn", "audio_context"):
            return cond_value  # text is never time, whatever its length
        return None


def mask_conds(video: Tensor, audio: Tensor) -> dict:
    """What the network reads of the masks [B, 48, T, H, W] and [B, 20, A]; waits for the device."""
    video, audio = (mask.mean(dim=1, keepdim=True) for mask in (video, audio))  # [B, 1, ...]
    first = video[..., :1, :1]
    same = bool((video == first).all())  # in all of each frame, as for a given first frame
    conds = {"denoise_mask": comfy.conds.CONDRegular(first if same else video)}
    if not bool((audio == 1).all()):
        conds["audio_denoise_mask"] = comfy.conds.CONDRegular(audio)
    return conds


def is_packed(latent) -> bool:
    """Whether a latent is core's packed form [B, 1, n] of several streams."""
    return torch.is_tensor(latent) and latent.ndim == 3 and latent.shape[1] == 1


def map_video(latent, function):
    """Apply a normalisation to the video of a nested latent or to a plain video latent.

    All else passes unchanged. What Ovi cannot sample at all is left to `check_joint_latent`, which
    comes later and has a sentence for it.
    """
    if getattr(latent, "is_nested", False):
        video, *rest = latent.unbind()
        return NestedTensor([function(video), *rest])
    is_video = latent.ndim == 5 and latent.shape[1] == GEOMETRY.video.channels
    return function(latent) if is_video else latent
