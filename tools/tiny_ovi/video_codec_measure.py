"""How good the trained video codec is, on scenes that are never trained on, through core's VAE."""

from __future__ import annotations

import time
from pathlib import Path

import comfy.sd
import numpy as np
import torch
from ovi_native.ovi_model.media.video_vae import decode_chunks
from ovi_native.tiny_world.picture import FACE_X, FPS, MOUTH_Y, render_frames
from ovi_native.tiny_world.scenes import BALL_RADIUS, FLOOR, Scene, draw_scene
from safetensors.torch import load_file

from .latents import Codec, load_codec
from .video_codec import EXPANDED, WAN

MOUTH_HALF_WIDTH, MOUTH_HALF_HEIGHT, AROUND = 14.0, 9.0, 2.0
NOISES = (0.05, 0.1, 0.2)  # on whitened latents


def psnr(found: torch.Tensor, frames: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Of [T, S, S, 3] in 0..1, where the mask [T, S, S] says so."""
    error = (found.clamp(0, 1) - frames).square().mean(-1)
    return float(-10 * torch.log10(error.mean() if mask is None else error[mask].mean()))


def region(scene: Scene, frames: int, size: int) -> tuple[str, torch.Tensor]:
    """Where the ball or the mouth is: its name and a mask [T, S, S]."""
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) * 64 / size] * 2, indexing="ij")
    if scene.ball:
        centre = torch.from_numpy(FLOOR - BALL_RADIUS - scene.ball.heights(np.arange(frames) / FPS))[:, None, None]
        return "ball", (x - scene.ball.x) ** 2 + (y - centre) ** 2 < (BALL_RADIUS + AROUND) ** 2
    assert scene.face is not None
    dx, dy = (x - FACE_X - scene.face.shift).abs(), (y - MOUTH_Y).abs()
    return "mouth", ((dx < MOUTH_HALF_WIDTH) & (dy < MOUTH_HALF_HEIGHT)).expand(frames, -1, -1)


def load_vae(path: Path) -> comfy.sd.VAE:
    vae = comfy.sd.VAE(sd=load_file(path))
    vae.throw_exception_if_invalid()
    return vae


def decode(vae: comfy.sd.VAE, z: torch.Tensor) -> torch.Tensor:
    """Whitened latents [48, T, h, w] -> [4T - 3, S, S, 3]."""
    return torch.cat(list(decode_chunks(vae, WAN.process_out(z[None]))))


def encode(vae: comfy.sd.VAE, frames: torch.Tensor) -> torch.Tensor:
    """[T, S, S, 3] -> whitened latents [48, T', h, w]."""
    return WAN.process_in(vae.encode(frames))[0]


@torch.no_grad()
def measure(folder: Path, clips: int = 16, frames: int = 49, size: int = 64, seed: int = 77) -> dict[str, float]:
    """Means over held-out scenes: PSNR in decibels, latents' errors in their own deviations, seconds.

    folder: with `bases.safetensors` and `vcodec`.
    """
    codec, vae = load_codec(folder / "bases.safetensors"), load_vae(folder / "vcodec" / EXPANDED)
    random, noise, rows, latents = np.random.default_rng(seed), torch.Generator().manual_seed(seed), [], []
    for index in range(clips):
        kind = ("ball", "face", "pair")[index % 3]
        scene = draw_scene(random, frames / FPS, held_out=True, kind=kind)
        clip = render_frames(scene, frames, size)
        rows.append(_measure_clip(vae, codec, scene, clip, noise))
        latents.append(encode(vae, torch.from_numpy(clip).float() / 255).flatten(1))
    found = {name: float(np.mean([row[name] for row in rows if name in row]))
             for name in sorted({name for row in rows for name in row})}
    whole = torch.cat(latents, 1)
    found |= {"latent mean, furthest from 0": float(whole.mean(1).abs().max()),
              "latent deviation, least": float(whole.std(1).min()), "latent deviation, most": float(whole.std(1).max())}
    return found | {"seconds for 121 frames": _time_decode(vae, size)}


def _measure_clip(vae: comfy.sd.VAE, codec: Codec, scene: Scene, clip: np.ndarray, noise: torch.Generator
                  ) -> dict[str, float]:
    frames, z = torch.from_numpy(clip).float() / 255, codec.encode_video(clip)
    name, mask = region(scene, len(clip), clip.shape[1])
    encoded, linear, found = encode(vae, frames), codec.decode_video(z), decode(vae, z)
    row = {"linear": psnr(linear, frames), f"linear, {name}": psnr(linear, frames, mask),
           "decoded": psnr(found, frames), f"decoded, {name}": psnr(found, frames, mask),
           "decoded, first frame": psnr(found[:1], frames[:1]),
           "encoded and decoded": psnr(decode(vae, encoded), frames),
           "latent error": float((encoded - z).square().mean().sqrt()),
           "first image's latent, largest difference": float((encode(vae, frames[:1]) - encoded[:, :1]).abs().max()),
           "core against chunks": float((vae.decode(WAN.process_out(z[None]))[0] - found).abs().max())}
    for strength in NOISES:
        noisy = z + strength * torch.randn(z.shape, generator=noise)
        row |= {f"decoded, noise {strength}": psnr(decode(vae, noisy), frames),
                f"linear, noise {strength}": psnr(codec.decode_video(noisy), frames)}
    return row


def _time_decode(vae: comfy.sd.VAE, size: int) -> float:
    z = torch.zeros(48, 31, size // 16, size // 16)
    begun = time.perf_counter()
    decode(vae, z)
    return time.perf_counter() - begun
