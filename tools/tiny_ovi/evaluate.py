"""Clips of the trained tiny Ovi through the product's own nodes, as mp4 files, and read back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

import comfy.sd
import comfy.utils
from devlib.media import read_media
from ovi_native.nodes.decode import OviDecodeVideo
from ovi_native.nodes.latents import OviEmptyLatent
from ovi_native.nodes.prompt import AUDIO_NEGATIVE, VIDEO_NEGATIVE, OviPrompt
from ovi_native.nodes.sampling import OviSampler
from ovi_native.ovi_model.media.audio_vae import load_audio_vae
from ovi_native.ovi_model.ovi.checkpoint import load_model
from ovi_native.ovi_model.text.umt5 import load_text_encoder
from ovi_native.tiny_world.sound import SAMPLE_RATE

from .files import FILES
from .latents import SIZE
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

    def empty(self, seconds: float) -> dict:
        """LATENT of a clip of which nothing is given."""
        return OviEmptyLatent.execute(VARIANT, "custom", SIZE, SIZE, seconds, 0, 1).result[0]

    def sample(self, text: str, seed: int, way: Way, seconds: float, model=None, latent: dict | None = None) -> dict:
        """LATENT of one clip; latent: what of it is given, of that length."""
        positive, negative, _ = OviPrompt.execute(self.clip, text, VARIANT, "", VIDEO_NEGATIVE, AUDIO_NEGATIVE).result
        latent = latent or self.empty(seconds)
        return OviSampler.execute(model or self.model, positive, negative, latent, seed, **asdict(way)).result[0]

    def decode(self, latent: dict, path: Path) -> None:
        """Write a LATENT as an mp4."""
        OviDecodeVideo.execute(latent, self.video_vae, self.audio_vae, 23.0).result[0][0].save_to(str(path))


def read_clip(path: Path, text: str) -> Clip:
    """An mp4 as frames and samples at 16 kHz."""
    media = read_media(path.read_bytes())
    assert media.rate == SAMPLE_RATE
    return Clip(text, media.frames, media.sound.mean(axis=1))


def generate(models: Models, texts: Iterable[str], folder: Path, way: Way | None = None, seconds: float = 5.0,
             seed: int = 0, model=None, latents: Iterable[dict] | None = None) -> Iterator[Clip]:
    """A clip for each text, seeds counting up; mp4 files stay in `folder`. latents: what is given of each."""
    folder.mkdir(parents=True, exist_ok=True)
    starts: Iterable[dict | None] = repeat(None) if latents is None else latents
    for number, (text, latent) in enumerate(zip(texts, starts, strict=False)):
        path = folder / f"{number:03}.mp4"
        models.decode(models.sample(text, seed + number, way or Way(), seconds, model, latent), path)
        yield read_clip(path, text)
