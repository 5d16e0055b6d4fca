"""From the sampled latent to frames and sound, or straight to a video file.

Both nodes look at the latent before anything is loaded, and at what the VAEs made of it before it becomes a picture or
a file: a value that is not finite would end as a black frame or as an error code of an encoder. The stock 'VAE Decode'
cannot be helped.
"""

import math
from collections.abc import Iterable, Iterator

import comfy.utils
import torch
from comfy_api.latest import InputImpl, io
from nodes import VAEDecode, VAEDecodeTiled

from ..ovi_model.files.disk import human
from ..ovi_model.media import audio_vae
from ..ovi_model.media.mp4 import NOT_FINITE, write_mp4
from ..ovi_model.media.video_vae import decode_chunks
from ..ovi_model.ovi.latents import check_finite, joint_streams, length_disagreement
from ..ovi_model.ovi.variants import GEOMETRY
from .inputs import check_inputs
from .report import report

SMALLEST_TILE = 64  # pixels, of core's tiled decoding
TILE_FRAMES = 64
MAX_CRF = 51
FPS = GEOMETRY.fps
VIDEO_VAE = f"Wan2.2 VAE ({GEOMETRY.video.channels} channels) from 'Load Ovi VAEs' or 'Load VAE'."
SOUND = f"{GEOMETRY.audio.sample_rate // 1000} kHz mono"


class OviDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviDecode",
            display_name="Ovi Decode",
            search_aliases=["vae decode", "audio video decode", "latent to video", "latent to audio",
                            "frames and sound", "tiled decode"],
            category="Ovi/latent",
            description="Decodes a joint latent to frames and to the model's own 16 kHz mono track, not resampled and "
                        "not rescaled.",
            inputs=[
                io.Latent.Input("latent", tooltip="From 'Ovi Sampler' or any sampler run on an Ovi latent."),
                io.Vae.Input("video_vae", tooltip=VIDEO_VAE),
                io.Vae.Input("audio_vae", tooltip="MMAudio VAE from 'Load Ovi Audio VAE'."),
                io.Int.Input("tile_size", default=0, min=0, max=4096, step=GEOMETRY.size_multiple, advanced=True,
                             tooltip=(
                    f"Width and height of a decoded tile in pixels, 0 for whole frames, else {SMALLEST_TILE} or more. "
                    "Try 512 if decoding runs out of memory; tiles overlap by a quarter and are blended.")),
                io.Int.Input("tile_frames", default=TILE_FRAMES, min=8, max=4096, step=GEOMETRY.video.temporal_stride,
                             advanced=True, tooltip=(
                    "Frames decoded at a time when tile_size is set. Fewer need less memory; chunks overlap by 8 "
                    "frames and are blended.")),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip=f"Frames at {FPS} per second, for 'Create Video'."),
                io.Audio.Output(display_name="audio", tooltip=f"{SOUND}, for 'Create Video' or 'Save Audio'."),
                io.Float.Output(display_name="fps", tooltip=(
                    f"Frames per second of the images, always {FPS}: connect it to fps of 'Create Video'.")),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, latent, video_vae, audio_vae, tile_size, tile_frames) -> io.NodeOutput:
        check_inputs(cls, latent=latent, tile_size=tile_size, tile_frames=tile_frames)
        video, audio = checked_streams(latent, "Ovi Decode")
        check_video_vae(video_vae)
        sound = decode_audio(audio_vae, audio, video.shape[0] * GEOMETRY.frames_from_latent(video.shape[2]))
        if tile_size:
            images, = VAEDecodeTiled().decode(
                video_vae, {"samples": video}, max(tile_size, SMALLEST_TILE), tile_size // 4, tile_frames, 8)
        else:
            images, = VAEDecode().decode(video_vae, {"samples": video})
        if not math.isfinite(images.sum(dtype=torch.float32).item()):
            raise ValueError(NOT_FINITE.format("The decoded picture"))
        warnings = [*filter(None, [length_disagreement(video.shape, audio.shape)]),
                    *tile_warnings(tile_size, tile_frames)]
        return io.NodeOutput(images, sound, float(FPS), ui=report(cls, [describe(video, audio)], warnings))


class OviDecodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviDecodeVideo",
            display_name="Ovi Decode to Video",
            search_aliases=["mp4", "h264", "vae decode", "audio video decode", "latent to video", "create video",
                            "video combine", "low memory decode"],
            category="Ovi/latent",
            description="Decodes a joint latent straight into an mp4 with sound, a few frames at a time: the memory it "
                        "needs does not grow with the length, but for the file itself.",
            inputs=[
                io.Latent.Input("latent", tooltip="From 'Ovi Sampler' or any sampler run on an Ovi latent."),
                io.Vae.Input("video_vae", tooltip=VIDEO_VAE),
                io.Vae.Input("audio_vae", tooltip="MMAudio VAE from 'Load Ovi Audio VAE'."),
                io.Float.Input("crf", default=23.0, min=0.0, max=float(MAX_CRF), step=1.0, advanced=True, tooltip=(
                    "Quality of the h264 picture, 0 to 51: lower values produce higher quality and larger files. 23 is "
                    "what 'Save Video' uses for frames; 0 is lossless, which few players can show.")),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip=(
                    f"{FPS} frames per second with {SOUND} sound, for 'Save Video', which copies it without "
                    "encoding it again.")),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, latent, video_vae, audio_vae, crf) -> io.NodeOutput:
        if not 0 <= crf <= MAX_CRF:
            raise ValueError(f"crf is {crf}, but x264's quality goes from 0 (lossless) to {MAX_CRF}; 23 is usual.")
        check_inputs(cls, latent=latent)
        video, audio = checked_streams(latent, "Ovi Decode to Video")
        check_video_vae(video_vae)
        frames = video.shape[0] * GEOMETRY.frames_from_latent(video.shape[2])
        warnings = [*filter(None, [length_disagreement(video.shape, audio.shape)])]
        chunks = show_progress(decode_chunks(video_vae, video, warnings.append), frames)
        sound = decode_audio(audio_vae, audio, frames)
        file = write_mp4(chunks, FPS, sound["waveform"][0], sound["sample_rate"], crf)
        line = f"{describe(video, audio)}; the file has {human(file.getbuffer().nbytes)}"
        return io.NodeOutput(InputImpl.VideoFromFile(file), ui=report(cls, [line], warnings))


def show_progress(chunks: Iterable[torch.Tensor], frames: int) -> Iterator[torch.Tensor]:
    """Pass chunks of frames on and show on the node how many of them are done."""
    bar = comfy.utils.ProgressBar(frames)
    for chunk in chunks:
        count = chunk.shape[0]
        yield chunk
        del chunk  # or it would stay until the next one is there
        bar.update(count)


def decode_audio(vae, latents, frames: int) -> dict:
    """Decode latents [B, 20, A] to ComfyUI AUDIO. Several clips follow one another like their frames do."""
    waveform = audio_vae.decode_waveform(vae, latents)  # [B, 1, samples]
    if not torch.isfinite(waveform).all():
        raise ValueError(NOT_FINITE.format("The decoded sound"))
    clips = waveform.shape[0]
    if clips > 1:
        length = round(frames / clips / FPS * GEOMETRY.audio.sample_rate)
        waveform = torch.nn.functional.pad(waveform, (0, length - waveform.shape[-1]))
        waveform = waveform.transpose(0, 1).reshape(1, 1, -1)
    return {"waveform": waveform, "sample_rate": GEOMETRY.audio.sample_rate}


# --- what is checked before, and said after ---------------------------------------------------------------------------


def checked_streams(latent, node: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(video, audio) of a joint latent fit to be decoded, or ValueError saying what was connected to the node."""
    video, audio = joint_streams(latent, node)
    check_finite((video, audio), node)
    return video, audio


def check_video_vae(vae) -> None:
    """Raise ValueError unless the VAE reads as many channels as Wan2.2's."""
    if vae.latent_channels != GEOMETRY.video.channels:
        raise ValueError(f"The video VAE has {vae.latent_channels} latent channels, but Ovi needs the Wan2.2 VAE with "
                         f"{GEOMETRY.video.channels} (wan2.2_vae.safetensors, not wan_2.1_vae). Choose it in "
                         "'Load Ovi VAEs' or 'Load VAE'.")


def describe(video, audio) -> str:
    """The clip in pixels, frames and seconds."""
    clips, _, latent_frames, *size = video.shape
    height, width = GEOMETRY.pixel_hw(*size)
    return (f"{f'{clips} clips, each ' if clips > 1 else ''}{width}x{height}, "
            f"{GEOMETRY.frames_from_latent(latent_frames)} frames at {FPS} per second = "
            f"{GEOMETRY.video_seconds(latent_frames):.2f} s, sound {GEOMETRY.audio_seconds(audio.shape[2]):.2f} s")


def tile_warnings(tile_size: int, tile_frames: int) -> list[str]:
    """What core's tiled decoding makes of sizes it does not have, and a size that is not used at all."""
    if not tile_size:
        return [] if tile_frames == TILE_FRAMES else ["tile_frames has no effect while tile_size is 0."]
    pixels, step = GEOMETRY.video.spatial_stride, GEOMETRY.video.temporal_stride
    size = max(tile_size, SMALLEST_TILE) // pixels * pixels
    frames = max(tile_frames // step, 2) * step
    asked = (("tile_size", tile_size, size, f"at least {SMALLEST_TILE} pixels, in steps of {pixels}"),
             ("tile_frames", tile_frames, frames, f"at least {2 * step}, in steps of {step}"))
    return [f"{name} {given} became {used}: {rule}." for name, given, used, rule in asked if given != used]
