"""Ovi's rates, its three released checkpoints, and the sizes that the reference recommends for them.

Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..geometry import MMAUDIO_16K, WAN22_VAE, Geometry

GEOMETRY = Geometry(fps=24, patch=2, video=WAN22_VAE, audio=MMAUDIO_16K)
"""Ovi's: sides are multiples of 32 pixels, a second of sound is 31.25 latents of 512 samples."""

TAGGED = "tagged"  # <AUDCAP>caption<ENDAUDCAP>
PLAIN = "plain"  # Audio: caption


@dataclass(frozen=True)
class Variant:
    """One released checkpoint: what it was trained on and how it wants its audio caption written."""

    name: str
    checkpoint: str
    latent_frames: int
    audio_latents: int
    area: int
    caption_style: str
    label: str

    @property
    def frames(self) -> int:
        """Video frames at the trained length."""
        return GEOMETRY.frames_from_latent(self.latent_frames)

    @property
    def seconds(self) -> float:
        """Video seconds at the trained length."""
        return GEOMETRY.video_seconds(self.latent_frames)


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("720x720_5s", "model.safetensors", 31, 157, 720 * 720, TAGGED, "5 s at 720x720"),
        Variant("960x960_5s", "model_960x960.safetensors", 31, 157, 960 * 960, PLAIN, "5 s at 960x960"),
        Variant("960x960_10s", "model_960x960_10s.safetensors", 61, 314, 960 * 960, PLAIN, "10 s at 960x960"),
    )
}
DEFAULT_VARIANT = "960x960_5s"
VARIANT_KEY = "ovi_variant"
"""Where a MODEL (attachment), a CONDITIONING, a LATENT and a file's metadata say which variant they are for."""


@dataclass(frozen=True)
class AspectPreset:
    """A size the reference's configuration recommends, and the area (720 or 960 squared) it belongs to."""

    height: int
    width: int
    area: int
    shape: str

    @property
    def label(self) -> str:
        """Text of the dropdown, width first as ComfyUI shows sizes; saved in workflows, so it must not change."""
        return f"{self.width}x{self.height} ({math.isqrt(self.area)} {self.shape})"

    def belongs_to(self, variant: Variant) -> bool:
        """Whether the reference recommends this size for that checkpoint."""
        return self.area == variant.area


ASPECT_PRESETS: dict[str, AspectPreset] = {
    p.label: p
    for p in (
        AspectPreset(704, 1280, 960 * 960, "wide"),
        AspectPreset(1280, 704, 960 * 960, "tall"),
        AspectPreset(960, 960, 960 * 960, "square"),
        AspectPreset(512, 992, 720 * 720, "wide"),
        AspectPreset(992, 512, 720 * 720, "tall"),
        AspectPreset(512, 960, 720 * 720, "wide"),
        AspectPreset(960, 512, 720 * 720, "tall"),
        AspectPreset(720, 720, 720 * 720, "square"),
        AspectPreset(448, 1120, 720 * 720, "ultra-wide"),
    )
}


def get_variant(name: str) -> Variant:
    """The variant of that name; ValueError naming the known ones otherwise."""
    if name not in VARIANTS:
        raise ValueError(f"Unknown Ovi variant {name!r}: expected one of {', '.join(VARIANTS)}.")
    return VARIANTS[name]


def disagreements(model: str | None, prompt: str | None, latent: str | None) -> list[str]:
    """One sentence for each part that is meant for another variant than the model; None means not known.

    Of a model that is not known, prompt and latent are compared with each other.

    Nothing stops: the variants share one architecture, but each was trained on one caption style, size and length.
    """
    if not model and prompt and latent and prompt != latent:
        return [f"The prompt was made for {prompt}, but the latent for {latent}: set the same variant in both, that of "
                "the model file, which does not tell its own."]
    parts = (("prompt", prompt, "its audio caption may be read out loud or ignored; set variant in 'Ovi Prompt'"),
             ("latent", latent, "size or length are not what it was trained on; set variant in 'Ovi Empty Latent' or "
                                "'Ovi First Frame'"))
    return [f"The model is {model}, but the {part} was made for {name}: {effect}."
            for part, name, effect in parts if model and name and name != model]
