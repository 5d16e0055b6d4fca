"""The latents that the tiny codecs are taught: principal components of the world's pixels and spectra, whitened.

A video latent stands for 4 frames of 16x16 pixels (latent frame 0 for the first frame alone, as if it stood still), an
audio latent for two frames of 80 log-mel bands. Linear codecs are exact to write down and quick to apply, so the
network trains on them while the real codecs, `video_codec` and `audio_codec`, learn to give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ovi_native.tiny_world.picture import render_frames
from ovi_native.tiny_world.scenes import draw_scene
from ovi_native.tiny_world.sound import render_sound
from safetensors.torch import load_file, save_file

SIZE, PATCH, FRAMES_PER_LATENT, SAMPLES_PER_LATENT = 64, 16, 4, 512
VIDEO_CHANNELS, AUDIO_CHANNELS = 48, 20
LEAST_LEVEL = 1e-5  # of the mel magnitudes whose logarithm is taken


@dataclass(frozen=True)
class Basis:
    """x [n, D] <-> z [n, C]: z = (x - mean) @ components, of variance 1 each."""

    mean: torch.Tensor  # [D]
    components: torch.Tensor  # [D, C]
    inverse: torch.Tensor  # [C, D]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) @ self.components

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.inverse + self.mean


def fit(x: torch.Tensor, channels: int) -> Basis:
    """Principal components of x [n, D]."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T.double() @ (x - mean).double() / len(x))
    vectors, deviation = vectors[:, -channels:].flip(1), values[-channels:].flip(0).sqrt()
    return Basis(mean, (vectors / deviation).float(), (vectors * deviation).T.float())


def patches(frames: np.ndarray) -> torch.Tensor:
    """[4n+1, S, S, 3] uint8 -> [n+1, h, w, 3072] in 0..1, the first frame four times over."""
    x = torch.from_numpy(frames).float() / 255
    x = torch.cat([x[:1].expand(FRAMES_PER_LATENT - 1, -1, -1, -1), x])
    t, h, w = len(x) // FRAMES_PER_LATENT, x.shape[1] // PATCH, x.shape[2] // PATCH
    x = x.reshape(t, FRAMES_PER_LATENT, h, PATCH, w, PATCH, 3)
    return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(3)


def unpatch(x: torch.Tensor) -> torch.Tensor:
    """The inverse: [n+1, h, w, 3072] -> [4n+1, S, S, 3]."""
    t, h, w, _ = x.shape
    x = x.reshape(t, h, w, FRAMES_PER_LATENT, PATCH, PATCH, 3).permute(0, 3, 1, 4, 2, 5, 6)
    return x.reshape(t * FRAMES_PER_LATENT, h * PATCH, w * PATCH, 3)[FRAMES_PER_LATENT - 1:]


class Spectra:
    """Log-mel spectra as MMAudio's 16 kHz codec takes them."""

    def __init__(self) -> None:
        from ovi_native.ovi_model.media.audio_vae import FFT_SIZE, mel_filterbank

        self.size, self.hop = FFT_SIZE, 256
        self.basis, self.window = mel_filterbank(), torch.hann_window(FFT_SIZE)

    def __call__(self, sound: torch.Tensor) -> torch.Tensor:
        """[..., N] at 16 kHz -> [..., 80, N / 256]."""
        reach = (self.size - self.hop) // 2
        shape = sound.shape[:-1]
        padded = torch.nn.functional.pad(sound.reshape(-1, 1, sound.shape[-1]).clamp(-1, 1), (reach, reach), "reflect")
        found = torch.stft(padded[:, 0], self.size, self.hop, self.size, self.window, center=False, return_complex=True)
        magnitude = (found.real**2 + found.imag**2 + 1e-9).sqrt()
        return (self.basis @ magnitude).clamp(min=LEAST_LEVEL).log10().reshape(*shape, 80, -1)


def pairs(mel: torch.Tensor) -> torch.Tensor:
    """[..., 80, 2L] -> [..., L, 160]."""
    return mel.unflatten(-1, (-1, 2)).movedim(-3, -1).flatten(-2)


def unpairs(x: torch.Tensor) -> torch.Tensor:
    """[..., L, 160] -> [..., 80, 2L]."""
    return x.unflatten(-1, (2, 80)).movedim(-1, -3).flatten(-2)


@dataclass(frozen=True)
class Codec:
    """Both bases, and clips as latents."""

    video: Basis
    audio: Basis

    def encode_video(self, frames: np.ndarray) -> torch.Tensor:
        """[4n+1, S, S, 3] -> [48, n+1, h, w]."""
        return self.video.encode(patches(frames)).movedim(-1, 0)

    def decode_video(self, latents: torch.Tensor) -> torch.Tensor:
        """[48, n+1, h, w] -> [4n+1, S, S, 3] in 0..1."""
        return unpatch(self.video.decode(latents.movedim(0, -1))).clamp(0, 1)

    def encode_audio(self, mel: torch.Tensor) -> torch.Tensor:
        """[80, 2L] -> [20, L]."""
        return self.audio.encode(pairs(mel)).transpose(-1, -2)

    def decode_audio(self, latents: torch.Tensor) -> torch.Tensor:
        """[20, L] -> [80, 2L]."""
        return unpairs(self.audio.decode(latents.transpose(-1, -2)))

    def save(self, path: Path) -> None:
        save_file({f"{name}.{part}": getattr(basis, part).contiguous() for name, basis in vars(self).items()
                   for part in ("mean", "components", "inverse")}, path)


def load_codec(path: Path) -> Codec:
    tensors = load_file(path)
    return Codec(*(Basis(*(tensors[f"{name}.{part}"] for part in ("mean", "components", "inverse")))
                   for name in ("video", "audio")))


def fit_codec(clips: int = 600, seconds: float = 3.0, seed: int = 0) -> Codec:
    """From random clips of the world."""
    random, spectra = np.random.default_rng(seed), Spectra()
    pictures, sounds = [], []
    latents = int(seconds * 6)
    for _ in range(clips):
        scene = draw_scene(random, seconds)
        x = patches(render_frames(scene, 4 * latents + 1, SIZE)).flatten(0, 2)
        pictures.append(x[torch.from_numpy(random.permutation(len(x))[:64])])
        samples = int(seconds * 31.25) * SAMPLES_PER_LATENT
        sounds.append(pairs(spectra(torch.from_numpy(render_sound(scene, samples)))))
    return Codec(fit(torch.cat(pictures), VIDEO_CHANNELS), fit(torch.cat(sounds), AUDIO_CHANNELS))
