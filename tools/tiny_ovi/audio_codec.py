"""The sound codec of the trained tiny Ovi: an MMAudio 16 kHz VAE and a BigVGAN vocoder of small width.

Both are core's own modules, trained here on the sounds of `tiny_world` and written in the published layouts.

The VAE learns the linear codec of `latents`: its encoder gives those latents, its decoder takes them back to log-mel
spectra, a little noise included. Its layers have no biases and forget the length of what they are given (each residual
block divides by it), so two spectra in the same direction would look the same. The origin of the spectra (`data_mean`,
which the file carries) is therefore moved away from them, along the direction in which they vary least.

The vocoder learns from spectra the same sounds `locked` to the frames, which makes it a regression of samples.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from comfy.ldm.mmaudio.vae.vae import VAE as MMAudioVAE
from ovi_native.ovi_model.media.audio_vae import NORM_EPSILON, fold_weight_norm
from ovi_native.tiny_world.scenes import draw_scene
from ovi_native.tiny_world.sound import render_sound
from safetensors.torch import load_file, save_file
from torch.nn.functional import l1_loss, mse_loss
from torch.nn.utils import parametrize

from .latents import AUDIO_CHANNELS, SAMPLES_PER_LATENT, Codec, Spectra, load_codec
from .locked import locked_sound
from .vocoder import Vocoder, vocoder_loss, vocoder_tensors

VAE_FILE, VOCODER_FILE = "tiny_ovi_mmaudio_vae.safetensors", "tiny_ovi_mmaudio_vocoder.safetensors"
VAE_WIDTH = 24
LOG_VARIANCE = -8.0  # of the encoder's latents
MOST_NOISE, VOCODER_NOISE = 0.15, 0.2  # standard deviations of noise on the latents that decoder and vocoder learn from
CLIP_LATENTS = 96
SLOW, SLOW_SHARE = "conv_pre.", 0.05  # what sums 560 values far from zero takes smaller steps


@dataclass(frozen=True)
class Sounds:
    """Sounds of the world with what the codec makes of them."""

    samples: torch.Tensor  # [n, N]
    locked: torch.Tensor  # [n, N], to the frames of the spectra
    mel: torch.Tensor  # [n, 80, N / 256]
    latents: torch.Tensor  # [n, 20, N / 512]


def draw_sounds(codec: Codec, clips: int, latents: int, seed: int, held_out: bool = False) -> Sounds:
    """Sounds of random scenes."""
    random, samples = np.random.default_rng(seed), latents * SAMPLES_PER_LATENT
    seconds = samples / 16_000
    scenes = [draw_scene(random, seconds, held_out) for _ in range(clips)]
    sounds, locked = (torch.stack([torch.from_numpy(render(scene, samples)) for scene in scenes])
                      for render in (render_sound, locked_sound))
    mel = Spectra()(sounds)
    return Sounds(sounds, locked, mel, codec.encode_audio(mel))


# The VAE ----------------------------------------------------------------------------------------------------------


class UnitKernels(torch.nn.Module):
    """Each output channel of a kernel at unit length, as the published kernels are brought to when they are loaded."""

    def forward(self, kernel: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(kernel, dim=(1, 2), keepdim=True)
        return kernel / (length + NORM_EPSILON * kernel[0].numel() ** 0.5)


def build_vae(width: int = VAE_WIDTH) -> MMAudioVAE:
    """Random, with kernels that are normalised whenever they are used."""
    vae = MMAudioVAE(data_dim=80, embed_dim=AUDIO_CHANNELS, hidden_dim=width)
    for module in list(vae.modules()):
        if isinstance(module, torch.nn.Conv1d):
            torch.nn.init.normal_(module.weight)
            parametrize.register_parametrization(module, "weight", UnitKernels())
    return vae


def place_origin(vae: MMAudioVAE, mel: torch.Tensor) -> None:
    """Set the normalisation of spectra: mel [n, 80, T]; one scale, and an origin off the spectra."""
    frames = mel.movedim(1, -1).flatten(0, 1)
    mean = frames.mean(0)
    scale = (frames - mean).square().mean().sqrt()
    _, vectors = torch.linalg.eigh((frames - mean).T.double() @ (frames - mean).double())
    away = vectors[:, 0].float() * scale * 80**0.5 * 0.7
    vae.data_mean.copy_((mean - away)[None, :, None])
    vae.data_std.copy_(scale.expand(1, 80, 1))


def vae_losses(vae: MMAudioVAE, mel: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor) -> dict:
    """Errors of the encoder's latents and of the decoder's spectra."""
    moments = vae.encode(mel)
    decoded = vae.decode(latents + noise)
    return {"latent": mse_loss(moments.mean, latents), "variance": (moments.logvar - LOG_VARIANCE).square().mean(),
            "mel": mse_loss(decoded, mel), "mel_l1": l1_loss(decoded, mel)}


# Files ------------------------------------------------------------------------------------------------------------


def vae_tensors(vae: MMAudioVAE) -> dict[str, torch.Tensor]:
    """As published: kernels not yet normalised."""
    return {name.replace("parametrizations.weight.original", "weight"): value.contiguous()
            for name, value in vae.state_dict().items()}


def at_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Half precision, save where it would show: the spectra's normalisation and the fixed filters."""
    kept = ("data_mean", "data_std", ".filter")
    return {name: value if name.endswith(kept) else value.half() for name, value in tensors.items()}


# Training ---------------------------------------------------------------------------------------------------------


class Run:
    """A network, its optimiser and its schedule, kept in one file."""

    def __init__(self, net: torch.nn.Module, path: Path, steps: int, rate: float, seed: int,
                 betas: tuple[float, float] = (0.8, 0.99)) -> None:
        self.net, self.path, self.steps, self.step = net, path, steps, 0
        named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
        slow = [parameter for name, parameter in named if name.startswith(SLOW)]
        others = [parameter for name, parameter in named if not name.startswith(SLOW)]
        self.parameters = slow + others
        groups = [{"params": slow, "share": SLOW_SHARE}, {"params": others, "share": 1.0}]
        self.optimizer = torch.optim.AdamW(groups, rate, betas=betas, weight_decay=0.0)
        self.rate, self.seed = rate, seed
        if path.exists():
            self.load()

    def load(self) -> None:
        tensors = load_file(self.path)
        self.step = int(tensors.pop("step"))
        self.net.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("net.")})
        state = {index: {key: tensors[f"adam.{index}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                 for index in range(len(self.parameters)) if f"adam.{index}.step" in tensors}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def save(self) -> None:
        tensors = {f"net.{name}": value.contiguous() for name, value in self.net.state_dict().items()}
        tensors |= {f"adam.{index}.{key}": value.contiguous() for index, state in
                    self.optimizer.state_dict()["state"].items() for key, value in state.items()}
        part = self.path.with_suffix(".part")
        save_file({**tensors, "step": torch.tensor(self.step)}, part)
        part.rename(self.path)

    def random(self) -> torch.Generator:
        """What this step draws from."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)

    def update(self, loss: torch.Tensor) -> None:
        """One step; the rate rises over 50 steps and falls to nothing at the end."""
        left = max(0.0, 1 - self.step / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.rate * min(1.0, (self.step + 1) / 50) * (0.01 + 0.99 * left)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.step += 1


def crop(random: torch.Generator, sounds: Sounds, batch: int, latents: int) -> Sounds:
    """Random stretches of random clips."""
    index = torch.randint(len(sounds.mel), (batch,), generator=random).tolist()
    starts = torch.randint(sounds.latents.shape[2] - latents + 1, (batch,), generator=random).tolist()
    cut = {}
    for field in fields(sounds):
        values = getattr(sounds, field.name)
        size = values.shape[-1] // sounds.latents.shape[-1]
        cut[field.name] = torch.stack([values[i][..., s * size:(s + latents) * size]
                                       for i, s in zip(index, starts, strict=True)])
    return Sounds(**cut)


def noise_on(latents: torch.Tensor, random: torch.Generator, most: float) -> torch.Tensor:
    """Noise of another strength for each clip."""
    strength = most * torch.rand((len(latents), 1, 1), generator=random)
    return strength * torch.randn(latents.shape, generator=random)


def train_vae(run: Run, sounds: Sounds, until: float) -> None:
    """Until the schedule ends or the time `until`."""
    vae, begun = run.net, time.time()
    while run.step < run.steps and time.time() < until:
        random = run.random()
        part = crop(random, sounds, 8, (32, 64, CLIP_LATENTS)[run.step % 3])
        losses = vae_losses(vae, part.mel, part.latents, noise_on(part.latents, random, MOST_NOISE))
        run.update(losses["latent"] + 0.01 * losses["variance"] + 4 * losses["mel"] + losses["mel_l1"])
        if run.step % 100 == 0:
            said = ", ".join(f"{name} {float(value.detach()) ** 0.5:.3f}" for name, value in losses.items())
            print(f"vae {run.step} of {run.steps}, {time.time() - begun:.0f} s: {said}", flush=True)
            run.save()
    run.save()


def train_vocoder(run: Run, sounds: Sounds, decode, until: float) -> None:
    """decode: latents [B, 20, L] -> the mel spectra [B, 80, 2 L] that the vocoder will be given."""
    begun, total, said = time.time(), 0.0, 0
    while run.step < run.steps and time.time() < until:
        random = run.random()
        part = crop(random, sounds, 8, 24)
        with torch.no_grad():
            decoded = decode(part.latents[2:] + noise_on(part.latents[2:], random, VOCODER_NOISE))
        loss = vocoder_loss(run.net(torch.cat([part.mel[:2], decoded]))[:, 0], part.locked)
        run.update(loss)
        total, said = total + float(loss.detach()), said + 1
        if run.step % 50 == 0:
            print(f"vocoder {run.step} of {run.steps}, {time.time() - begun:.0f} s: {total / said:.3f}", flush=True)
            total, said = 0.0, 0
            run.save()
    run.save()


VAE_STEPS, VOCODER_STEPS = 2600, 2500  # of the schedules
CLIPS = 500


def write(folder: Path, vae: MMAudioVAE | None = None, vocoder: Vocoder | None = None) -> None:
    """Put the files of those given in `folder`, each whole or not at all."""
    for net, name, tensors in ((vae, VAE_FILE, vae_tensors), (vocoder, VOCODER_FILE, vocoder_tensors)):
        if net is not None:
            part = folder / f"{name}.part"
            save_file(at_half(tensors(net)), part)
            part.rename(folder / name)


def begin_with(vae: MMAudioVAE, vocoder: Vocoder, folder: Path) -> None:
    """Take the weights of a pair of files below `folder`."""
    kernels = {name for name in vae.state_dict() if name.endswith(".original")}
    tensors = load_file(folder / "audio_vae.safetensors")
    vae.load_state_dict({name: tensors[name.replace("parametrizations.weight.original", "weight")
                                       if name in kernels else name].float() for name in vae.state_dict()})
    vocoder.load_state_dict(fold_weight_norm(load_file(folder / "vocoder.safetensors")))


def train(folder: Path, minutes: float, seed: int = 0, bases: Path | None = None, start: Path | None = None) -> None:
    """Train both, the VAE for at most a quarter of the time; leave checkpoints and the two files in `folder`.

    bases: the file of the linear codec, else the one beside `folder`. What `folder` holds of an earlier training goes
    on; else that begins with the pair of files below `start`, if given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codec, begun = load_codec(bases or folder.parent / "bases.safetensors"), time.time()
    sounds = draw_sounds(codec, CLIPS, CLIP_LATENTS, seed + 11)
    torch.manual_seed(seed)
    vae, vocoder = build_vae(), Vocoder()
    place_origin(vae, sounds.mel)
    vocoder.start_with_powers(sounds.mel)
    if start is not None:
        begin_with(vae, vocoder, start)
    train_vae(Run(vae, folder / "vae.run", VAE_STEPS, 8e-3, seed + 1), sounds, begun + 15 * minutes)
    write(folder, vae=vae)
    run = Run(vocoder, folder / "vocoder.run", VOCODER_STEPS, 4e-4, seed + 2, (0.9, 0.999))
    train_vocoder(run, sounds, vae.decode, begun + 60 * minutes)
    write(folder, vocoder=vocoder)
