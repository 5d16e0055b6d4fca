"""Clips of the trained tiny Ovi through the product's own nodes, as mp4 files, and read back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import comfy.sd
import comfy.utils
import numpy as np
import torch
from devlib.media import read_media
from ovi_native.nodes.decode import OviDecodeVideo
from ovi_native.nodes.latents import OviEmptyLatent, OviFirstFrame
from ovi_native.nodes.prompt import AUDIO_NEGATIVE, VIDEO_NEGATIVE, OviPrompt
from ovi_native.nodes.sampling import OviSampler
from ovi_native.ovi_model.media.audio_vae import load_audio_vae
from ovi_native.ovi_model.ovi.checkpoint import load_model
from ovi_native.ovi_model.text.umt5 import load_text_encoder
from ovi_native.tiny_world.captions import caption
from ovi_native.tiny_world.scenes import draw_scene
from ovi_native.tiny_world.sound import SAMPLE_RATE

from .files import FILES
from .scores import Clip

VARIANT = "960x960_5s"


@dataclass(frozen=True)
class Way:
    """How clips are sampled: what 'Ovi Sampler' is set to."""

    steps: int = 25
    solver: str = "unipc"
    shift: float = 5.0
    video_guidance: float = 2.5
    audio_guidance: float = 2.5
    skip_layer: int = -1
    denoise: float = 1.0


class Models:
    """The five files below a models folder, loaded as the loaders' nodes do."""

    def __init__(self, folder: Path) -> None:
        paths = {role: str(folder / name) for role, name in FILES.items()}
        self.model = load_model(paths["model"])[0]
        self.clip = load_text_encoder(paths["text_encoder"])
        self.video_vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(paths["video_vae"]))
        self.audio_vae = load_audio_vae(paths["audio_vae"], paths["vocoder"])

    def sample(self, text: str, seed: int, way: Way, seconds: float, size: int = 64, model=None,
               first_frame: torch.Tensor | None = None) -> dict:
        """LATENT of one clip; first_frame: IMAGE [1, H, W, 3] that it begins with."""
        positive, negative, _ = OviPrompt.execute(self.clip, text, VARIANT, "", VIDEO_NEGATIVE, AUDIO_NEGATIVE).result
        latent = OviEmptyLatent.execute(VARIANT, "custom", size, size, seconds, 0, 1).result[0]
        if first_frame is not None:
            latent = OviFirstFrame.execute(self.video_vae, first_frame, VARIANT, "crop", latent).result[0]
        return OviSampler.execute(model or self.model, positive, negative, latent, seed, **asdict(way)).result[0]

    def decode(self, latent: dict, path: Path) -> None:
        """Write a LATENT as an mp4."""
        OviDecodeVideo.execute(latent, self.video_vae, self.audio_vae, 23.0).result[0][0].save_to(str(path))


def read_clip(path: Path, text: str) -> Clip:
    """An mp4 as frames and samples at 16 kHz."""
    media = read_media(path.read_bytes())
    assert media.rate == SAMPLE_RATE
    return Clip(text, media.frames, media.sound.mean(axis=1))


def held_out_captions(count: int, seconds: float, seed: int = 0, kind: str | None = None) -> list[str]:
    """Captions that training never saw."""
    random = np.random.default_rng(seed)
    return [caption(draw_scene(random, seconds, held_out=True, kind=kind)) for _ in range(count)]


def generate(models: Models, texts: Iterable[str], folder: Path, way: Way | None = None, seconds: float = 5.0,
             seed: int = 0, model=None) -> Iterator[Clip]:
    """A clip for each text, seeds counting up; mp4 files stay in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        path = folder / f"{number:03}.mp4"
        models.decode(models.sample(text, seed + number, way or Way(), seconds, model=model), path)
        yield read_clip(path, text)
