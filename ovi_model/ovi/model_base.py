"""Where Ovi meets ComfyUI's model classes: detection config, latent normalisation, conditioning, context windows.

ComfyUI samples a joint latent as one packed tensor [B, 1, n]: the video [B, 48, T, H, W] flattened, then the audio
[B, 20, A]. It asks the model to normalise that tensor before it says how the streams are shaped, so `process_latent_in`
hands back a marked copy and `extra_conds`, the first hook that knows the shapes, normalises its video part in place.
"""

import logging
import math
import weakref

import comfy.conds
import comfy.context_windows
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor

from ..files.loading import cast_as_declared, own_memory, storages
from ..sampling.stream_guidance import Sampling, check_finite
from .conditioning import SKIP_LAYER_KEY, TEXT_ROWS, check_text, lost_rows, read_texts
from .latents import check_joint_latent, length_disagreement
from .model import AUDIO_ROPE_SCALE, OviModel, fit_text
from .variants import GEOMETRY

NO_FLOAT16 = ("Ovi computes in %s although float16 was asked for (--fp16-unet, --force-fp16 or 'ModelComputeDtype'): "
              "float16 overflows in this model and gives black frames.")


def safe_dtype(device) -> torch.dtype:
    """What to compute in on a device where float16 was asked for."""
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32


class CondRows(comfy.conds.CONDConstant):
    """Something other than a tensor for each batch row, so that batching never waits for the device."""

    def __init__(self, cond: list):
        super().__init__(cond)

    def process_cond(self, batch_size, **_):
        return self._copy_with(repeat_rows(self.cond, batch_size))

    def can_concat(self, _other):
        return True

    def concat(self, others):
        return list(self.cond) + [row for other in others for row in other.cond]


def repeat_rows(rows: list, batch_size: int) -> list:
    """Repeat a list cyclically to batch_size entries, as core does with tensors."""
    return [rows[i % len(rows)] for i in range(batch_size)]


class OviBaseModel(comfy.model_base.BaseModel):
    """The fused model behind ComfyUI's MODEL."""

    def __init__(self, model_config, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=OviModel)
        self._awaiting_shapes = None  # weak reference to the packed latent that extra_conds must still normalise
        self._latent_shapes: list = []  # stream shapes of the sampling in progress

    sampling: Sampling | None = None
    _current_patcher = None

    @property
    def current_patcher(self):
        """The MODEL that samples with this model. Core sets it where a sampling begins, and None where it ends."""
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

    def length_disagreement(self) -> str | None:
        """One sentence if picture and sound of the sampling in progress do not last equally long."""
        return length_disagreement(*self._latent_shapes)

    def load_model_weights(self, sd, unet_prefix="", assign=False):
        """As core's; a model that core does not load dynamically gets memory and dtypes of its own, see `loading`."""
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

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={},  # noqa: B006
                     **kwargs):
        """As core's, with what the network reads from its options as arguments.

        A compiled network is not compiled again when its options change, only when its arguments do.
        """
        kwargs["rope"] = self.diffusion_model.rope_tables(kwargs["latent_shapes"], x.device, transformer_options)
        kwargs["shown_timestep"] = transformer_options.get("ovi_timestep")
        return super()._apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

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
            n = math.prod(self._latent_shapes[0][1:])
            video = latent_image[:, :, :n].reshape(latent_image.shape[0], *self._latent_shapes[0][1:])
            latent_image[:, :, :n] = self.latent_format.process_in(video).reshape(latent_image.shape[0], 1, n)

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
        for sentence in lost_rows(text, audio_text):
            logging.warning(sentence)
        out["c_crossattn"] = comfy.conds.CONDRegular(fit_text(text, TEXT_ROWS))
        out["audio_context"] = comfy.conds.CONDRegular(fit_text(audio_text, TEXT_ROWS))
        out["skip_layers"] = CondRows([int(kwargs.get(SKIP_LAYER_KEY, -1))])

        mask = kwargs.get("denoise_mask")
        if mask is not None:
            video_mask, audio_mask = comfy.utils.unpack_latents(mask, shapes)
            video_mask = video_mask.mean(dim=1, keepdim=True)
            first = video_mask[..., :1, :1]
            same = bool((video_mask == first).all())  # in all of each frame, as for a given first frame
            out["denoise_mask"] = comfy.conds.CONDRegular(first if same else video_mask)
            if not bool((audio_mask == 1).all()):
                out["audio_denoise_mask"] = comfy.conds.CONDRegular(audio_mask.mean(dim=1, keepdim=True))
        return out

    def scale_latent_inpaint(self, *, latent_image, **_):
        return latent_image  # kept frames enter the model clean, at timestep 0

    # context windows

    def map_context_window_to_modalities(self, primary_indices, latent_shapes, dim):
        """Map a window's video frames to the audio latents played during them, contiguous and covering all audio."""
        frames, latents = latent_shapes[0][dim], latent_shapes[1][dim]

        def first_latent(frame):
            return latents if frame >= frames else min(round(frame / AUDIO_ROPE_SCALE), latents - 1)

        audio = [a for frame in primary_indices for a in range(first_latent(frame), first_latent(frame + 1))]
        return [primary_indices, audio or [latents - 1]]

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=()):
        if cond_key == "denoise_mask":
            return comfy.context_windows.slice_cond(
                cond_value, window, x_in, device, temporal_dim=2, retain_index_list=list(retain_index_list))
        if cond_key == "audio_denoise_mask":
            audio_window = window.get_window_for_modality(1)
            return cond_value._copy_with(audio_window.get_tensor(cond_value.cond, device, dim=2))
        if cond_key in ("c_crossattn", "audio_context"):
            return cond_value  # text is never time, even if its length happens to equal the number of frames
        return None


def is_packed(latent) -> bool:
    """Whether a latent is core's packed form [B, 1, n] of several streams."""
    return torch.is_tensor(latent) and latent.ndim == 3 and latent.shape[1] == 1


def map_video(latent, function):
    """Apply a normalisation to the video of a nested latent or to a plain video latent; all else passes unchanged.

    What Ovi cannot sample at all is left to `check_joint_latent`, which comes later and has a sentence for it.
    """
    if getattr(latent, "is_nested", False):
        video, *rest = latent.unbind()
        return NestedTensor([function(video), *rest])
    return function(latent) if latent.ndim == 5 and latent.shape[1] == GEOMETRY.video.channels else latent
