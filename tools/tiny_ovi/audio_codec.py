"""The sound codec of the trained tiny Ovi: an MMAudio 16 kHz VAE and a BigVGAN vocoder of small width.

Both are core's own modules, trained here on the sounds of `tiny_world` and written in the published layouts.

The VAE learns the linear codec of `latents`: its encoder gives those latents, its decoder takes them back to log-mel
spectra, a little noise included. Its layers have no biases and forget the length of what they are given (each residual
block divides by it), so two spectra in the same direction would look the same. The origin of the spectra (`data_mean`,
which the file carries) is therefore moved away from them, along the direction in which they vary least.

The vocoder is trained from spectra to samples with spectral distances at several resolutions. Only the residual blocks
of its first two stages (250 Hz and 1 kHz) are trained; those of the later stages add nothing, which leaves a linear
synthesis filterbank there. Training then skips them, which is exact and several times faster.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from comfy.ldm.mmaudio.vae.bigvgan import BigVGANVocoder
from comfy.ldm.mmaudio.vae.vae import VAE as MMAudioVAE
from ovi_native.ovi_model.media.audio_vae import NORM_EPSILON, VOCODER_CONFIG, fold_weight_norm
from ovi_native.tiny_world.scenes import draw_scene
from ovi_native.tiny_world.sound import render_sound
from safetensors.torch import load_file, save_file
from torch.nn.functional import l1_loss, mse_loss
from torch.nn.utils import parametrize

from .distance import SpectralDistance
from .latents import AUDIO_CHANNELS, SAMPLES_PER_LATENT, Codec, Spectra, load_codec

VAE_FILE, VOCODER_FILE = "tiny_ovi_mmaudio_vae.safetensors", "tiny_ovi_mmaudio_vocoder.safetensors"
VAE_WIDTH, VOCODER_WIDTH = 24, 128
TRAINED_BLOCKS = (1, 2, 4, 15)  # of the vocoder's residual blocks: kernels 7 and 11 at 250 Hz, 7 at 1 kHz, 3 at 16 kHz
LEAST_RMS, RMS_RANGE = -4.5, 4.0  # log10 of the loudness that the vocoder's envelope takes as 0, and of 0 to 1
DAUBECHIES = (0.4829629131445341, 0.8365163037378079, 0.2241438680420134, -0.1294095225512604)
LOG_VARIANCE = -8.0  # of the encoder's latents
MOST_NOISE = 0.15  # standard deviation of the noise on the latents that the decoder learns from
CLIP_LATENTS = 96
SLOW, SLOW_SHARE = "conv_pre.", 0.05  # what sums 560 values far from zero takes smaller steps


@dataclass(frozen=True)
class Sounds:
    """Sounds of the world with what the codec makes of them."""

    samples: torch.Tensor  # [n, N]
    mel: torch.Tensor  # [n, 80, N / 256]
    latents: torch.Tensor  # [n, 20, N / 512]


def draw_sounds(codec: Codec, clips: int, latents: int, seed: int, held_out: bool = False) -> Sounds:
    """Sounds of random scenes."""
    random, samples = np.random.default_rng(seed), latents * SAMPLES_PER_LATENT
    seconds = samples / 16_000
    sounds = torch.stack([torch.from_numpy(render_sound(draw_scene(random, seconds, held_out), samples))
                          for _ in range(clips)])
    mel = Spectra()(sounds)
    return Sounds(sounds, mel, codec.encode_audio(mel))


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


# The vocoder ------------------------------------------------------------------------------------------------------


class Vocoder(BigVGANVocoder):
    """Core's vocoder, of whose residual blocks only a few are trained; the others pass their input on."""

    def __init__(self, width: int = VOCODER_WIDTH) -> None:
        super().__init__({**VOCODER_CONFIG, "num_mels": 80, "upsample_initial_channel": width})
        for name, parameter in self.named_parameters():
            if parameter.ndim == 3:
                fan = parameter.shape[0] * 2 if name.startswith("ups.") else parameter[0].numel()
                torch.nn.init.normal_(parameter, std=(0.3 if ".convs2." in name else 1.0) * fan**-0.5)
            else:
                torch.nn.init.zeros_(parameter)
        for index, block in enumerate(self.resblocks):
            if index not in TRAINED_BLOCKS:
                block.requires_grad_(False)
                for parameter in block.convs2.parameters():
                    torch.nn.init.zeros_(parameter)
        with torch.no_grad():  # spectra lie about -3.5, with a deviation of 1
            self.conv_pre.weight.mul_(0.7)
            self.conv_pre.bias.copy_(3.5 * self.conv_pre.weight.sum((1, 2)))
            self._start_as_wavelets()
            self._start_with_envelope()

    def _start_as_wavelets(self) -> None:
        """Make the later stages synthesise: trees of wavelet packets, of which each step merges two bands."""
        low = torch.tensor(DAUBECHIES)
        high = low.flip(0) * torch.tensor([1.0, -1.0, 1.0, -1.0])
        for (up,) in self.ups[2:]:
            up.weight.mul_(0.02)
            for channel in range(max(1, up.weight.shape[1] // 2)):
                up.weight[2 * channel, channel] += low
                up.weight[2 * channel + 1, channel] += high

    def _start_with_envelope(self) -> None:
        """Give one path through the net to the loudness u, 0..1, made u^8, by which the last stage multiplies.

        There the two channels are carrier + envelope and carrier - envelope, and sin^2(x + y) - sin^2(x - y) is
        sin 2x sin 2y. What is squared on the way is so by sin^2 of a small argument; one more channel keeps what was
        there before, to take it off again.
        """
        e, copy, kept = 61, 62, 63
        slope = torch.tensor([1, 3, 5, 7, 7, 5, 3, 1]) / 8
        first, second = self.ups[0][0].weight, self.ups[1][0].weight
        first[:, e:], first[-1] = 0, 0
        first[-1, e:] = slope
        for index in (1, 2):
            for pair in range(3):
                self.resblocks[index].convs2[pair].weight[e:] = 0
        self._square(self.resblocks[1], e, copy, kept)
        second[:, 16] = 0
        second[e, 16], second[kept, 16] = 3 * slope, -2 * slope
        for pair in range(3):
            self.resblocks[4].convs2[pair].weight[16] = 0
        channel, line = 16, torch.tensor([0.25, 0.75, 0.75, 0.25])
        for (up,) in self.ups[2:5]:
            up.weight[channel], up.weight[:, channel // 2] = 0, 0
            up.weight[channel, channel // 2] = line
            channel //= 2
        last = self.ups[5][0].weight
        last[:, 1] = last[:, 0]
        last[2:] = 0
        last[2, 0], last[2, 1] = line, -line
        self._multiply(self.resblocks[15])

    @staticmethod
    def _square(block: torch.nn.Module, e: int, copy: int, kept: int) -> None:
        """u -> about u^4 in the first pair of convolutions, about u^8 in the second."""
        for activation in block.activations[:4]:
            activation.act.alpha[e:] = -6.0
        for activation in block.activations[:3]:
            activation.act.alpha[e], activation.act.beta[e] = math.log(0.7), 2 * math.log(math.sin(0.7))
        for pair in range(2):
            before, after = block.convs1[pair].weight, block.convs2[pair].weight
            middle, centre = before.shape[2] // 2, after.shape[2] // 2
            before[e:] = 0
            before[[e, copy], e, middle], before[[e, copy], copy, middle] = 1.0, -1.0
            before[kept, copy, middle] = 1.0
            for row in (e, copy) if pair == 0 else (e,):
                after[row, e, centre], after[row, kept, centre] = 1.0, -1.0
                after[row, copy, centre] = -1.0 if pair == 0 else 0.0

    def _multiply(self, block: torch.nn.Module) -> None:
        """(c + a, c - a) -> c times a, by the first pair of convolutions and the last one of the net."""
        for pair in range(3):
            torch.nn.init.zeros_(block.convs2[pair].weight)
        torch.nn.init.constant_(block.activations[0].act.alpha, math.log(0.7))
        torch.nn.init.constant_(block.activations[1].act.alpha, -6.0)
        torch.nn.init.constant_(self.activation_post.act.alpha, -6.0)
        before, after = block.convs1[0].weight, block.convs2[0].weight
        torch.nn.init.zeros_(before)
        before[0, :, 1] = torch.tensor([1.0, -1.0])
        after[:, 0, 1] = torch.tensor([-1.5, 1.5])
        torch.nn.init.zeros_(self.conv_post.weight)
        self.conv_post.weight[0, :, 3] = torch.tensor([-0.7, 0.7])

    @torch.no_grad()
    def fit_loudness(self, mel: torch.Tensor, samples: torch.Tensor) -> None:
        """Start the envelope as the best linear guess: mel [n, 80, T], samples [n, 256 T]."""
        rms = samples.unflatten(-1, (-1, 256)).square().mean(-1).sqrt().clamp(min=1e-9).log10()
        wanted = ((rms - LEAST_RMS) / RMS_RANGE).clamp(0, 1).flatten()
        frames = torch.nn.functional.pad(mel, (3, 3)).unfold(2, 7, 1).movedim(2, 1).flatten(0, 1).flatten(1)
        frames = torch.cat([frames, torch.ones(len(frames), 1)], 1)
        gram = frames.T @ frames + 1e-3 * len(frames) * torch.eye(frames.shape[1])
        solved = torch.linalg.solve(gram.double(), (frames.T @ wanted).double()).float()
        self.conv_pre.weight[-1] = solved[:-1].unflatten(0, (80, 7))
        self.conv_pre.bias[-1] = solved[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As core's, without the blocks that add nothing: mel [B, 80, T] -> [B, 1, 256 T]."""
        x = self.conv_pre(x)
        for stage, (up,) in enumerate(self.ups):
            x = up(x)
            first = stage * self.num_kernels
            trained = [self.resblocks[i] for i in range(first, first + self.num_kernels) if i in TRAINED_BLOCKS]
            if trained:
                x = (sum(block(x) for block in trained) + (self.num_kernels - len(trained)) * x) / self.num_kernels
        return torch.tanh(self.conv_post(self.activation_post(x)))


# Files ------------------------------------------------------------------------------------------------------------


def vae_tensors(vae: MMAudioVAE) -> dict[str, torch.Tensor]:
    """As published: kernels not yet normalised."""
    return {name.replace("parametrizations.weight.original", "weight"): value.contiguous()
            for name, value in vae.state_dict().items()}


def vocoder_tensors(vocoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As published: each kernel as directions and their lengths; what is all zero has a direction too."""
    out = {}
    for name, value in vocoder.state_dict().items():
        if name.endswith("weight"):
            length = torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
            directions = torch.where(length > 0, value / length.clamp(min=1e-12), torch.ones(()))
            out[f"{name}_g"], out[f"{name}_v"] = length, directions
        else:
            out[name] = value.contiguous()
    return out


def at_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Half precision, save where it would show: the spectra's normalisation and the fixed filters."""
    kept = ("data_mean", "data_std", ".filter")
    return {name: value if name.endswith(kept) else value.half() for name, value in tensors.items()}


# Training ---------------------------------------------------------------------------------------------------------


class Run:
    """A network, its optimiser and its schedule, kept in one file."""

    def __init__(self, net: torch.nn.Module, path: Path, steps: int, rate: float, seed: int) -> None:
        self.net, self.path, self.steps, self.step = net, path, steps, 0
        named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
        slow = [parameter for name, parameter in named if name.startswith(SLOW)]
        others = [parameter for name, parameter in named if not name.startswith(SLOW)]
        self.parameters = slow + others
        groups = [{"params": slow, "share": SLOW_SHARE}, {"params": others, "share": 1.0}]
        self.optimizer = torch.optim.AdamW(groups, rate, betas=(0.8, 0.99), weight_decay=0.0)
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


def crop(random: torch.Generator, sounds: Sounds, batch: int, latents: int):
    """Samples [B, 512 L], mel [B, 80, 2 L] and latents [B, 20, L] of random stretches of random clips."""
    index = torch.randint(len(sounds.mel), (batch,), generator=random)
    starts = torch.randint(sounds.latents.shape[2] - latents + 1, (batch,), generator=random)
    return [torch.stack([values[i][..., s * size:(s + latents) * size]
                         for i, s in zip(index.tolist(), starts.tolist(), strict=True)])
            for values, size in ((sounds.samples, SAMPLES_PER_LATENT), (sounds.mel, 2), (sounds.latents, 1))]


def noise_on(latents: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Noise of another strength for each clip."""
    strength = MOST_NOISE * torch.rand((len(latents), 1, 1), generator=random)
    return strength * torch.randn(latents.shape, generator=random)


def train_vae(run: Run, sounds: Sounds, until: float) -> None:
    """Until the schedule ends or the time `until`."""
    vae, begun = run.net, time.time()
    while run.step < run.steps and time.time() < until:
        random = run.random()
        _, mel, latents = crop(random, sounds, 8, (32, 64, CLIP_LATENTS)[run.step % 3])
        losses = vae_losses(vae, mel, latents, noise_on(latents, random))
        run.update(losses["latent"] + 0.01 * losses["variance"] + 4 * losses["mel"] + losses["mel_l1"])
        if run.step % 100 == 0:
            said = ", ".join(f"{name} {float(value.detach()) ** 0.5:.3f}" for name, value in losses.items())
            print(f"vae {run.step} of {run.steps}, {time.time() - begun:.0f} s: {said}", flush=True)
            run.save()
    run.save()


def train_vocoder(run: Run, sounds: Sounds, decode, until: float) -> None:
    """decode: latents [B, 20, L] -> the mel spectra [B, 80, 2 L] that the vocoder will be given."""
    vocoder, begun, distance, spectra = run.net, time.time(), SpectralDistance(), Spectra()
    total, said = 0.0, 0
    while run.step < run.steps and time.time() < until:
        random = run.random()
        samples, mel, latents = crop(random, sounds, 3, 32)
        with torch.no_grad():
            decoded = decode(latents[1:] + noise_on(latents[1:], random))
        made = vocoder(torch.cat([mel[:1], decoded]))[:, 0]
        sizes = [SpectralDistance.SIZES[i] for i in torch.randperm(6, generator=random)[:2]]
        loss = distance(made, samples, sizes) + 2 * l1_loss(spectra(made), spectra(samples))
        run.update(loss)
        total, said = total + float(loss.detach()), said + 1
        if run.step % 25 == 0:
            print(f"vocoder {run.step} of {run.steps}, {time.time() - begun:.0f} s: {total / said:.3f}", flush=True)
            total, said = 0.0, 0
            run.save()
    run.save()


VAE_STEPS, VOCODER_STEPS = 2600, 4000  # of the schedules
CLIPS = 400


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
    vocoder.fit_loudness(sounds.mel, sounds.samples)
    if start is not None:
        begin_with(vae, vocoder, start)
    train_vae(Run(vae, folder / "vae.run", VAE_STEPS, 8e-3, seed + 1), sounds, begun + 15 * minutes)
    write(folder, vae=vae)
    run = Run(vocoder, folder / "vocoder.run", VOCODER_STEPS, 1e-3, seed + 2)
    train_vocoder(run, sounds, vae.decode, begun + 60 * minutes)
    write(folder, vocoder=vocoder)
