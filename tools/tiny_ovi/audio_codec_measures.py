"""What the trained sound codec does to held-out sounds, through the product's own loader and calls."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from ovi_native.ovi_model.media.audio_vae import decode_waveform, encode_mean, load_audio_vae
from ovi_native.tiny_world.measure.scores import sync
from ovi_native.tiny_world.measure.sounds import onsets
from ovi_native.tiny_world.measure.speech import sung
from ovi_native.tiny_world.scenes import Scene, draw_scene
from ovi_native.tiny_world.sound import render_sound

from .audio_codec import VAE_FILE, VOCODER_FILE
from .latents import SAMPLES_PER_LATENT, Spectra, load_codec

LATENTS = 157  # 5.02 s
TOLERANCE = 1 / 24  # seconds between onsets that are the same
SOUNDING = 1e-3  # root mean square of 32 ms from which a stretch counts as sound


def draw_held_out(clips: int, seed: int) -> tuple[list[Scene], torch.Tensor]:
    """Scenes that no training sees, and their sounds [n, N]."""
    random, samples = np.random.default_rng(seed), LATENTS * SAMPLES_PER_LATENT
    scenes = [draw_scene(random, samples / 16_000, held_out=True) for _ in range(clips)]
    return scenes, torch.stack([torch.from_numpy(render_sound(scene, samples)) for scene in scenes])


def decibels(sounds: torch.Tensor) -> torch.Tensor:
    """[..., N] -> loudness [...] in dBFS."""
    return 10 * sounds.square().mean(-1).clamp(min=1e-12).log10()


def compare(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Sounds [n, N] by spectra and loudness."""
    spectra = Spectra()
    mels = spectra(before), spectra(after)
    stretches = [sounds.unflatten(-1, (-1, SAMPLES_PER_LATENT)) for sounds in (before, after)]
    sounding = stretches[0].square().mean(-1).sqrt() >= SOUNDING
    change = (decibels(stretches[1]) - decibels(stretches[0]))[sounding]
    clips = decibels(after) - decibels(before)
    return {"log-spectral distance, dB": 20 * float((mels[0] - mels[1]).square().mean().sqrt()),
            "the same where it sounds, dB": 20 * float((mels[0] - mels[1])[..., ::2].movedim(1, -1)[sounding].square()
                                                      .mean().sqrt()),
            "loudness of clips, mean change, dB": float(clips.mean()),
            "loudness of clips, greatest change, dB": float(clips.abs().max()),
            "loudness of 32 ms, median absolute change, dB": float(change.abs().median()),
            "silence, dBFS": float(decibels(stretches[1][stretches[0].abs().amax(-1) == 0].flatten()))}


def recognise(scenes: list[Scene], sounds: torch.Tensor) -> dict[str, float]:
    """How well the detectors find in the sounds [n, N] what the scenes hold."""
    precise, timbres, vowels, voices, f1 = [], [], [], [], []
    for scene, sound in zip(scenes, sounds.numpy(), strict=True):
        if scene.ball:
            found = onsets(sound)
            true = [time for time, _ in scene.ball.contacts(len(sound) / 16_000)]
            f1.append(sync(true, [onset.time for onset in found]).f1)
            timbres += [onset.timbre == scene.ball.timbre for onset in found]
            precise += [min(abs(onset.time - time) for time in true) for onset in found]
        if scene.face:
            heard = sung(sound)
            for start, end, vowel in scene.face.spoken():
                if end > len(sound) / 16_000:
                    continue
                hit = [one for one in heard if abs(one.start + one.end - start - end) < 0.3]
                vowels.append(bool(hit) and hit[0].vowel == vowel)
                voices.append(bool(hit) and hit[0].voice == scene.face.voice)
    return {"onset F1": float(np.mean(f1)), "onset error, median, ms": 1000 * float(np.median(precise)),
            "onsets within 10 ms": float(np.mean(np.array(precise) <= 0.010)),
            "timbre": float(np.mean(timbres)), "vowel": float(np.mean(vowels)), "voice": float(np.mean(voices))}


@torch.no_grad()
def measure(folder: Path, clips: int = 30, seed: int = 99, bases: Path | None = None) -> dict[str, dict[str, float]]:
    """Figures of the pair of files in `folder`; bases: the file of the linear codec that they learned, else
    the one beside `folder`."""
    vae = load_audio_vae(str(folder / VAE_FILE), str(folder / VOCODER_FILE))
    codec, spectra = load_codec(bases or folder.parent / "bases.safetensors"), Spectra()
    random = torch.Generator().manual_seed(seed)
    scenes, sounds = draw_held_out(clips, seed)
    mel = spectra(sounds)
    latents = codec.encode_audio(mel)
    found = encode_mean(vae, sounds[:, None]).cpu()
    error = (found - latents).square().mean((0, 2)).sqrt()
    report = {"encoder": {"error": float(error.square().mean().sqrt()), "worst channel": float(error.max())}}
    model = vae.first_stage_model.vae
    for noise in (0.0, 0.1, 0.2):
        noisy = latents + noise * torch.randn(latents.shape, generator=random)
        learned = float((model.decode(noisy) - mel).square().mean().sqrt())
        linear = float((codec.decode_audio(noisy) - mel).square().mean().sqrt())
        report[f"decoder, noise {noise}"] = {"mel error": learned, "of the linear codec": linear}
    report["renderer's own"] = recognise(scenes, sounds)
    waves = {"there and back": found, "its latents, noise 0.1": latents + 0.1 * torch.randn(latents.shape,
                                                                                           generator=random)}
    for name, z in waves.items():
        after = decode_waveform(vae, z)[:, 0].cpu()
        report[name] = compare(sounds, after) | recognise(scenes, after)
    begun = time.perf_counter()
    decode_waveform(vae, latents[:1])
    report["time"] = {"decoding 5.02 s, s": time.perf_counter() - begun}
    return report
