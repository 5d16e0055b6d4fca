"""Ovi's rates, its three released checkpoints, and the sizes that the reference recommends for them.

Standard library only.
"""

from __future__ import annotations

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


ASPECTS: dict[str, tuple[int, int]] = {  # label: height to width
    "16:9 wide": (9, 16), "9:16 tall": (16, 9), "1:1 square": (1, 1), "4:3 wide": (3, 4), "3:4 tall": (4, 3),
    "5:2 ultra-wide": (2, 5),
}
"""Shapes of a clip; its size is the variant's area in this shape, see `size_for`."""

OLD_ASPECTS: dict[str, tuple[int, int]] = {
    f"{width}x{height} ({area} {shape})": (height, width)
    for width, height, area, shape in (
        (1280, 704, 960, "wide"), (704, 1280, 960, "tall"), (960, 960, 960, "square"), (992, 512, 720, "wide"),
        (512, 992, 720, "tall"), (960, 512, 720, "wide"), (512, 960, 720, "tall"), (720, 720, 720, "square"),
        (1120, 448, 720, "ultra-wide"),
    )
}
"""What the list offered before, the sizes that the reference recommends: saved workflows name them."""


def size_for(aspect: str, variant: Variant) -> tuple[int, int]:
    """(height, width) in pixels of a clip of that shape, a label of `ASPECTS` or `OLD_ASPECTS`."""
    return GEOMETRY.snap_hw(*(ASPECTS | OLD_ASPECTS)[aspect], variant.area)


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
