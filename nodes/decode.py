"""From the sampled latent to frames and sound, or straight to a video file."""

import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import InputImpl, io
from nodes import VAEDecode, VAEDecodeTiled

from ..ovi_model import audio_vae
from ..ovi_model.mp4 import write_mp4
from ..ovi_model.streaming import decode_chunks
from ..ovi_model.variants import FPS, frames_from_latent


class OviDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviDecode",
            display_name="Ovi Decode",
            category="Ovi/latent",
            description="Decodes a joint latent to frames and to the model's own 16 kHz mono track, not resampled and "
                        "not rescaled.",
            inputs=[
                io.Latent.Input("latent", tooltip="From 'Ovi Sampler' or any sampler run on an Ovi latent."),
                io.Vae.Input("video_vae", tooltip="Wan2.2 VAE (48 channels) from 'Load VAE'."),
                io.Vae.Input("audio_vae", tooltip="MMAudio VAE from 'Load Ovi Audio VAE'."),
                io.Int.Input("tile_size", default=0, min=0, max=4096, step=32, advanced=True, tooltip=(
                    "Width and height of a decoded tile in pixels, 0 for whole frames. Try 512 if decoding runs out of "
                    "memory; tiles overlap by a quarter and are blended.")),
                io.Int.Input("tile_frames", default=64, min=8, max=4096, step=4, advanced=True, tooltip=(
                    "Frames decoded at a time when tile_size is set. Fewer need less memory; chunks overlap by 8 "
                    "frames and are blended.")),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip=f"Frames at {FPS} per second, for 'Create Video'."),
                io.Audio.Output(display_name="audio", tooltip="16 kHz mono, for 'Create Video' or 'Save Audio'."),
            ],
        )

    @classmethod
    def execute(cls, latent, video_vae, audio_vae, tile_size, tile_frames) -> io.NodeOutput:
        video, audio = split_latent(latent["samples"], "Ovi Decode")
        check_video_vae(video_vae)
        if tile_size:
            images, = VAEDecodeTiled().decode(
                video_vae, {"samples": video}, max(tile_size, 64), tile_size // 4, tile_frames, 8)
        else:
            images, = VAEDecode().decode(video_vae, {"samples": video})
        return io.NodeOutput(images, decode_audio(audio_vae, audio, images.shape[0]))


class OviDecodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviDecodeVideo",
            display_name="Ovi Decode to Video",
            category="Ovi/latent",
            description="Decodes a joint latent straight into an mp4 with sound, a few frames at a time: the memory it "
                        "needs does not grow with the length.",
            inputs=[
                io.Latent.Input("latent", tooltip="From 'Ovi Sampler' or any sampler run on an Ovi latent."),
                io.Vae.Input("video_vae", tooltip="Wan2.2 VAE (48 channels) from 'Load VAE'."),
                io.Vae.Input("audio_vae", tooltip="MMAudio VAE from 'Load Ovi Audio VAE'."),
                io.Float.Input("crf", default=23.0, min=0.0, max=51.0, step=1.0, advanced=True, tooltip=(
                    "Quality of the h264 picture, 0 to 51: lower values produce higher quality and larger files. 23 is "
                    "what 'Save Video' uses for frames; 0 is lossless, which few players can show.")),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip=(
                    f"{FPS} frames per second with 16 kHz mono sound, for 'Save Video', which copies it without "
                    "encoding it again.")),
            ],
        )

    @classmethod
    def execute(cls, latent, video_vae, audio_vae, crf) -> io.NodeOutput:
        video, audio = split_latent(latent["samples"], "Ovi Decode to Video")
        check_video_vae(video_vae)
        frames = video.shape[0] * frames_from_latent(video.shape[2])
        chunks = show_progress(decode_chunks(video_vae, video), frames)
        sound = decode_audio(audio_vae, audio, frames)
        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"ovi_{uuid.uuid4().hex}.mp4"
        write_mp4(path, chunks, FPS, sound["waveform"][0], sound["sample_rate"], crf)
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)))


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
    clips = waveform.shape[0]
    if clips > 1:
        length = round(frames / clips / FPS * audio_vae.SAMPLE_RATE)
        waveform = torch.nn.functional.pad(waveform, (0, length - waveform.shape[-1]))
        waveform = waveform.transpose(0, 1).reshape(1, 1, -1)
    return {"waveform": waveform, "sample_rate": audio_vae.SAMPLE_RATE}


def split_latent(samples, node: str):
    """Return (video, audio) of a joint latent, or raise ValueError saying what was connected to the node."""
    if not getattr(samples, "is_nested", False) or len(samples.unbind()) != 2:
        raise ValueError(f"'{node}' needs a joint video and audio latent, but got a single one of shape "
                         f"{list(samples.shape)}. Connect the sampler's output directly, or use 'VAE Decode' for "
                         "video and 'VAE Decode Audio' for sound.")
    return samples.unbind()


def check_video_vae(vae) -> None:
    """Raise ValueError unless the VAE reads Wan2.2's 48 channels."""
    if vae.latent_channels != 48:
        raise ValueError(f"The video VAE has {vae.latent_channels} latent channels, but Ovi needs the Wan2.2 VAE with "
                         "48 (wan2.2_vae.safetensors, not wan_2.1_vae). Choose it in 'Load VAE'.")
