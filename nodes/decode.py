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
EACH = "Of a batch one after another: the nodes that follow run once a clip, and 'Save Video' writes a file each."
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
            description="Turns a joint latent (picture and sound in one) into frames and the model's own 16 kHz mono "
                        "track, not resampled and not rescaled.",
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
                io.Image.Output(display_name="images", is_output_list=True, tooltip=(
                    f"Frames at {FPS} per second, for 'Create Video'. {EACH}")),
                io.Audio.Output(display_name="audio", is_output_list=True, tooltip=(
                    f"{SOUND}, for 'Create Video' or 'Save Audio'. {EACH}")),
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
        sounds = decode_audio(audio_vae, audio)
        if tile_size:
            images, = VAEDecodeTiled().decode(
                video_vae, {"samples": video}, max(tile_size, SMALLEST_TILE), tile_size // 4, tile_frames, 8)
        else:
            images, = VAEDecode().decode(video_vae, {"samples": video})
        if not math.isfinite(images.sum(dtype=torch.float32).item()):
            raise ValueError(NOT_FINITE.format("The decoded picture"))
        warnings = [*filter(None, [length_disagreement(video.shape, audio.shape)]),
                    *tile_warnings(tile_size, tile_frames)]
        return io.NodeOutput(list(images.chunk(video.shape[0])), sounds, float(FPS),
                             ui=report(cls, [describe(video, audio)], warnings))


class OviDecodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviDecodeVideo",
            display_name="Ovi Decode to Video",
            search_aliases=["mp4", "h264", "vae decode", "audio video decode", "latent to video", "create video",
                            "video combine", "low memory decode"],
            category="Ovi/latent",
            description="Turns a joint latent (picture and sound in one) straight into an mp4, a few frames at a time: "
                        "the memory it needs does not grow with the length, but for the file itself.",
            inputs=[
                io.Latent.Input("latent", tooltip="From 'Ovi Sampler' or any sampler run on an Ovi latent."),
                io.Vae.Input("video_vae", tooltip=VIDEO_VAE),
                io.Vae.Input("audio_vae", tooltip="MMAudio VAE from 'Load Ovi Audio VAE'."),
                io.Float.Input("crf", default=23.0, min=0.0, max=float(MAX_CRF), step=1.0, advanced=True, tooltip=(
                    "How much the file's picture is compressed, 0 to 51: lower is better and larger, 23 is usual and "
                    "what 'Save Video' uses for frames. 0 loses nothing, but few players can show it.")),
            ],
            outputs=[
                io.Video.Output(display_name="video", is_output_list=True, tooltip=(
                    f"{FPS} frames per second with {SOUND} sound, for 'Save Video', which copies it without "
                    f"encoding it again. {EACH}")),
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
        warnings = [*filter(None, [length_disagreement(video.shape, audio.shape)])]
        bar = comfy.utils.ProgressBar(video.shape[0] * GEOMETRY.frames_from_latent(video.shape[2]))
        files = []
        for number, sound in enumerate(decode_audio(audio_vae, audio)):
            said: list[str] = []
            chunks = show_progress(decode_chunks(video_vae, video[number:number + 1], said.append), bar)
            files.append(write_mp4(chunks, FPS, sound["waveform"][0], sound["sample_rate"], crf))
            warnings += [f"Clip {number + 1}: {each}" if video.shape[0] > 1 else each for each in said]
        size = human(sum(file.getbuffer().nbytes for file in files))
        made = f"the {len(files)} files have" if len(files) > 1 else "the file has"
        line = f"{describe(video, audio)}; {made} {size}"
        return io.NodeOutput([InputImpl.VideoFromFile(file) for file in files], ui=report(cls, [line], warnings))


def show_progress(chunks: Iterable[torch.Tensor], bar: comfy.utils.ProgressBar) -> Iterator[torch.Tensor]:
    """Pass chunks of frames on and show on the node how many of them are done."""
    for chunk in chunks:
        count = chunk.shape[0]
        yield chunk
        del chunk  # or it would stay until the next one is there
        bar.update(count)


def decode_audio(vae, latents) -> list[dict]:
    """Decode latents [B, 20, A] to ComfyUI AUDIO, one a clip."""
    waveform = audio_vae.decode_waveform(vae, latents)  # [B, 1, samples]
    if not torch.isfinite(waveform).all():
        raise ValueError(NOT_FINITE.format("The decoded sound"))
    return [{"waveform": clip, "sample_rate": GEOMETRY.audio.sample_rate} for clip in waveform.split(1)]


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
