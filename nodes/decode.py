"""From the sampled latent to frames and sound."""

import torch
from comfy_api.latest import io
from nodes import VAEDecode, VAEDecodeTiled

from ..ovi_model import audio_vae
from ..ovi_model.variants import FPS


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
        video, audio = split_latent(latent["samples"])
        check_video_vae(video_vae)
        if tile_size:
            images, = VAEDecodeTiled().decode(
                video_vae, {"samples": video}, max(tile_size, 64), tile_size // 4, tile_frames, 8)
        else:
            images, = VAEDecode().decode(video_vae, {"samples": video})
        return io.NodeOutput(images, decode_audio(audio_vae, audio, images.shape[0]))


def decode_audio(vae, latents, frames: int) -> dict:
    """Decode latents [B, 20, A] to ComfyUI AUDIO. Several clips follow one another like their frames do."""
    waveform = audio_vae.decode_waveform(vae, latents)  # [B, 1, samples]
    clips = waveform.shape[0]
    if clips > 1:
        length = round(frames / clips / FPS * audio_vae.SAMPLE_RATE)
        waveform = torch.nn.functional.pad(waveform, (0, length - waveform.shape[-1]))
        waveform = waveform.transpose(0, 1).reshape(1, 1, -1)
    return {"waveform": waveform, "sample_rate": audio_vae.SAMPLE_RATE}


def split_latent(samples):
    """Return (video, audio) of a joint latent, or raise ValueError saying what was connected."""
    if not getattr(samples, "is_nested", False) or len(samples.unbind()) != 2:
        raise ValueError(f"'Ovi Decode' needs a joint video and audio latent, but got a single one of shape "
                         f"{list(samples.shape)}. Connect the sampler's output directly, or use 'VAE Decode' for "
                         "video and 'VAE Decode Audio' for sound.")
    return samples.unbind()


def check_video_vae(vae) -> None:
    """Raise ValueError unless the VAE reads Wan2.2's 48 channels."""
    if vae.latent_channels != 48:
        raise ValueError(f"The video VAE has {vae.latent_channels} latent channels, but Ovi needs the Wan2.2 VAE with "
                         "48 (wan2.2_vae.safetensors, not wan_2.1_vae). Choose it in 'Load VAE'.")
