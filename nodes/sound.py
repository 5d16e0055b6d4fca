"""Sound of the same length as the picture: by the sample for AUDIO, by the latent inside a joint latent.

Before encoding, 'Ovi Fit Sound' pads with silence, which the VAE encodes as silence. 'Ovi Fit Sound Latent' repairs
what 'Concat AV Latent' has joined: no latent is silence, so what is missing is left for the model to make.
"""

import math
from fractions import Fraction
from typing import Any

import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import io

from ..ovi_model.ovi.latents import check_finite, check_joint_latent, streams_of
from ..ovi_model.ovi.variants import GEOMETRY
from .inputs import check_inputs
from .report import report

MAX_SECONDS = 3600
MAX_FRAMES = MAX_SECONDS * GEOMETRY.fps


class OviFitSound(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviFitSound",
            display_name="Ovi Fit Sound",
            search_aliases=["trim audio", "pad audio", "cut audio", "audio length", "match audio to video"],
            category="Ovi/latent",
            description="Cuts a sound at the end or adds silence there, so that it lasts exactly as long as the "
                        "picture. Rate and channels stay.",
            inputs=[
                io.Audio.Input("audio", tooltip="The sound to fit. Every item of a batch is fitted by itself."),
                io.Float.Input("seconds", default=0.0, min=0.0, max=float(MAX_SECONDS), step=0.01, tooltip=(
                    f"Length in seconds, 0 to {MAX_SECONDS}. 0 to use frames, images or latent.")),
                io.Int.Input("frames", default=0, min=0, max=MAX_FRAMES, tooltip=(
                    f"Length in frames at fps, 0 to {MAX_FRAMES}, not snapped; goes before seconds. 0 to use seconds, "
                    "images or latent.")),
                io.Float.Input("fps", default=float(GEOMETRY.fps), min=0.01, max=1000.0, step=0.01, advanced=True,
                               tooltip=(
                    f"Frames per second, 0.01 to 1000, for frames and images; Ovi's own are {GEOMETRY.fps}.")),
                io.Float.Input("fade", default=0.0, min=0.0, max=60.0, step=0.01, advanced=True, tooltip=(
                    "Seconds, 0 to 60, in which the sound fades out before it is cut or silence begins; 0.02 avoids a "
                    "click. 0 changes no sample. A sound that fits already is not faded.")),
                io.Image.Input("images", optional=True, tooltip=(
                    "The picture: its number of frames is the length. Goes before frames and seconds.")),
                io.Latent.Input("latent", optional=True, tooltip=(
                    "An Ovi latent: the length of one of its clips. Goes before everything else.")),
            ],
            outputs=[
                io.Audio.Output(tooltip="The sound in its own rate and channels, of exactly the length asked for."),
                io.Float.Output(display_name="seconds", tooltip="Its length in seconds."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, audio, seconds, frames, fps, fade, images=None, latent=None) -> io.NodeOutput:
        waveform, rate = check_audio(audio)
        check_inputs(cls, **{} if latent is None else {"latent": latent})
        check_numbers(seconds, frames, fps, fade)
        asked = lengths(seconds, frames, fps, images, latent)
        if not asked:
            raise ValueError("'Ovi Fit Sound' was given no length: set seconds or frames, or connect images or an Ovi "
                             "latent.")
        (source, length), *others = asked.items()
        ignored = [f"{name} ({float(other):.2f} s) was not used: {source} goes before it." for name, other in
                   others if other != length]
        count = round(length * rate)
        if not count:
            raise ValueError(f"The {source} given to 'Ovi Fit Sound' make a length of {float(length):g} s, which is no "
                             f"sample at {rate} Hz. Give a longer one.")
        fitted = fit_waveform(waveform, count, round(fade * rate))
        line = describe_fit(waveform.shape[-1] / rate, count / rate, source)
        return io.NodeOutput({**audio, "waveform": fitted}, count / rate, ui=report(cls, [line], ignored))


class OviFitSoundLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviFitSoundLatent",
            display_name="Ovi Fit Sound Latent",
            search_aliases=["trim audio latent", "pad audio latent", "audio length", "match audio to video"],
            category="Ovi/latent",
            description="Cuts or lengthens the sound inside a joint latent to the length of its picture, and its noise "
                        "mask with it; for use before the sampler.",
            inputs=[
                io.Latent.Input("latent", tooltip=(
                    "Joint latent, as 'Concat AV Latent' makes it of a picture and an encoded sound. What the sound is "
                    "too short by is left for the model to make; a single sound serves every clip of a batch of 2 or "
                    "more.")),
            ],
            outputs=[
                io.Latent.Output(tooltip="The same joint latent with as many audio latents as its picture needs."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        check_inputs(cls, latent=latent)
        video, audio = streams_with_one_sound(latent["samples"])
        clips = video.shape[0]
        length = GEOMETRY.audio_latents_for(video.shape[2])
        out = {**latent, "samples": NestedTensor((video, fit_latents(audio, length, 0.0)))}
        mask = latent.get("noise_mask")
        if mask is not None and mask.is_nested and len(mask.unbind()) > 1:  # any other is for the picture alone
            video_mask, audio_mask = mask.unbind()
            audio_mask = stretch_mask(audio_mask, clips, audio.shape[2])
            out["noise_mask"] = NestedTensor((video_mask, fit_latents(audio_mask, length, 1.0)))
        line = describe_fit(GEOMETRY.audio_seconds(audio.shape[2]), GEOMETRY.audio_seconds(length),
                            f"the picture, {GEOMETRY.video_seconds(video.shape[2]):.2f} s")
        return io.NodeOutput(out, ui=report(cls, [line], []))


def streams_with_one_sound(samples) -> tuple[torch.Tensor, torch.Tensor]:
    """(video, audio) of a joint latent, a single sound repeated for every clip; ValueError for any other latent."""
    streams = streams_of(samples)
    if len(streams) == 2 and streams[1].ndim == 3 and streams[1].shape[0] == 1:
        streams[1] = streams[1].expand(streams[0].shape[0], -1, -1)
    check_joint_latent([stream.shape for stream in streams], "'Ovi Fit Sound Latent'")
    check_finite(streams, "Ovi Fit Sound Latent")
    return streams[0], streams[1]


def check_audio(audio: Any) -> tuple[torch.Tensor, int]:
    """(waveform [B, C, N], rate) of ComfyUI AUDIO; ValueError if it holds no sound or none that can be used."""
    waveform = audio["waveform"] if audio else None
    if waveform is None or waveform.ndim != 3 or 0 in waveform.shape[:2] or not audio["sample_rate"] > 0:
        got = "nothing" if waveform is None else f"{list(waveform.shape)} at {audio['sample_rate']} Hz"
        raise ValueError(f"'Ovi Fit Sound' needs AUDIO with a waveform [batch, channels, samples], but got {got}. A "
                         "video without sound gives none.")
    if not torch.isfinite(waveform).all():
        raise ValueError("The sound given to 'Ovi Fit Sound' holds values that are not finite (NaN or infinite). Look "
                         "for the fault in the node it comes from.")
    return waveform, int(audio["sample_rate"])


def check_numbers(seconds: float, frames: int, fps: float, fade: float) -> None:
    """Raise ValueError unless all are finite and within their range."""
    for name, value, low, high in (("seconds", seconds, 0, MAX_SECONDS), ("frames", frames, 0, MAX_FRAMES),
                                   ("fps", fps, 0.01, 1000), ("fade", fade, 0, 60)):
        if not low <= value <= high:
            raise ValueError(f"{name} of 'Ovi Fit Sound' is {value}; it goes from {low} to {high}.")


def lengths(seconds: float, frames: int, fps: float, images, latent) -> dict[str, Fraction]:
    """The lengths asked for in seconds, exact, by what asks for them; the first one counts."""
    rate = Fraction(fps).limit_denominator(1_000_000)  # what was typed, not the nearest binary number
    asked: dict[str, Fraction] = {}
    if latent is not None:
        video = streams_of(latent["samples"])[0]
        if video.ndim != 5:
            raise ValueError(f"'Ovi Fit Sound' got a latent of shape {list(video.shape)}, which has no frames. Connect "
                             "an Ovi latent or its video part.")
        asked["latent"] = Fraction(GEOMETRY.frames_from_latent(video.shape[2]), GEOMETRY.fps)
    if images is not None:
        asked["images"] = images.shape[0] / rate
    if frames:
        asked["frames"] = frames / rate
    if seconds:
        asked["seconds"] = Fraction(seconds).limit_denominator(1_000_000)
    return asked


def fit_waveform(waveform: torch.Tensor, count: int, fade: int) -> torch.Tensor:
    """[B, C, N] -> [B, C, count], cut or followed by zeros; the last `fade` samples kept go linearly to zero."""
    if waveform.shape[-1] == count:
        return waveform
    kept = waveform[..., :count]
    fade = min(fade, kept.shape[-1])
    if fade:
        ramp = torch.linspace(1, 0, fade + 1, dtype=kept.dtype, device=kept.device)[1:]
        kept = torch.cat([kept[..., :-fade], kept[..., -fade:] * ramp], dim=-1)
    return torch.nn.functional.pad(kept, (0, count - kept.shape[-1]))


def fit_latents(latents: torch.Tensor, length: int, value: float) -> torch.Tensor:
    """[B, C, A] -> [B, C, length], cut or followed by `value`."""
    return torch.nn.functional.pad(latents, (0, length - latents.shape[-1]), value=value)


def stretch_mask(mask: torch.Tensor, clips: int, length: int) -> torch.Tensor:
    """A mask of sound as [clips, C, length], stretched as core does before sampling; one drawn as a picture by column.
    """
    mask = mask.float().flatten(2, -2).mean(2) if mask.ndim > 3 else mask
    return comfy.utils.reshape_mask(mask, (clips, mask.shape[1], length))


def describe_fit(before: float, after: float, source: str) -> str:
    """What was done, in seconds."""
    if math.isclose(before, after, abs_tol=1e-6):
        return f"The sound lasts {after:.3f} s already (length from {source}): nothing was changed."
    done = f"{before - after:.3f} s were cut" if before > after else f"{after - before:.3f} s were added"
    return f"The sound lasted {before:.3f} s and lasts {after:.3f} s now (length from {source}): {done}."
