"""The weight files of Ovi and of its companions: where they are published, and under which names they circulate.

Which of the three variants a file is, its metadata or else its name tells: `variant_of`, for the loader, for the list
of 'Ovi Weights' and for `tools/dev.py` alike. Sizes and addresses are those of the public repositories in late 2026.
Only the standard library: `tools/dev.py` reads this before there is a ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..files.catalogue import WeightFile, first_served, own_name
from .variants import DEFAULT_VARIANT, VARIANT_KEY, VARIANTS, get_variant

ROLES = {
    "model": "Ovi model", "text_encoder": "UMT5-XXL text encoder", "video_vae": "Wan 2.2 video VAE",
    "audio_vae": "MMAudio 16 kHz VAE", "vocoder": "BigVGAN vocoder",
}
PRECISIONS = ("bf16", "fp8")
DEFAULT_PRECISION = "bf16"

_OVI, _OVI_FP8 = "chetwinlow1/Ovi", "Kijai/WanVideo_comfy_fp8_scaled"
_BF16_SIZE, _FP8_SIZE = 23_300_000_000, 12_341_119_544
_APACHE, NON_COMMERCIAL = "Apache-2.0", "CC-BY-NC-4.0"

# The two pinned hashes stand, with size and commit, in several independent public lists; SwarmUI's download table has
# the text encoder's too. For the others none was found outside the Hub. Where each licence is stated: docs/formats.md.
FILES: dict[str, WeightFile] = {
    file.id: file
    for file in (
        *(WeightFile(f"model_{v.name}_bf16", "model", _OVI, v.checkpoint, "diffusion_models", _BF16_SIZE,
                      licence=_APACHE)
          for v in VARIANTS.values()),
        WeightFile("model_720x720_5s_fp8", "model", "rkfg/Ovi-fp8_quantized", "model_fp8_e4m3fn.safetensors",
                   "diffusion_models", 12_000_000_000, licence=_APACHE),
        WeightFile("model_960x960_5s_fp8", "model", _OVI_FP8,
                   "TI2V/Ovi/Wan2_2-5B-Ovi_960x960_fp8_e4m3fn_scaled_KJ.safetensors", "diffusion_models", _FP8_SIZE,
                   licence=_APACHE),
        WeightFile("model_960x960_10s_fp8", "model", _OVI_FP8,
                   "TI2V/Ovi/Wan2_2-5B-Ovi_960x960_10s_fp8_e4m3fn_scaled_KJ.safetensors", "diffusion_models",
                   _FP8_SIZE, licence=_APACHE),
        WeightFile("text_encoder", "text_encoder", "Comfy-Org/Wan_2.1_ComfyUI_repackaged",
                   "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders", 6_735_906_897,
                   sha256="c3355d30191f1f066b26d93fba017ae9809dce6c627dda5f6a66eaa651204f68",
                   revision="617a7633e636506f850e043bc4605f290a466a8e", licence=_APACHE),
        WeightFile("video_vae", "video_vae", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
                   "split_files/vae/wan2.2_vae.safetensors", "vae", 1_409_400_960,
                   sha256="e40321bd36b9709991dae2530eb4ac303dd168276980d3e9bc4b6e2b75fed156",
                   revision="ee6f4a40737a995bf5818954cfce6d59443b0f04", licence=_APACHE),
        WeightFile("audio_vae", "audio_vae", "Kijai/WanVideo_comfy",
                   "Ovi/mmaudio_vae_16k_bf16.safetensors", "vae", 326_154_893, licence=NON_COMMERCIAL),
        WeightFile("vocoder", "vocoder", "Kijai/WanVideo_comfy",
                   "Ovi/mmaudio_vocoder_bigvgan_best_netG_bf16.safetensors", "vae", 213_323_484,
                   licence=NON_COMMERCIAL),
    )
}


def needed_files(variant: str, precision: str = DEFAULT_PRECISION) -> list[WeightFile]:
    """The files to download for a variant, one for each role; ValueError for a name that is not one of ours."""
    get_variant(variant)
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}.")
    return [FILES[f"model_{variant}_{precision}"], *(FILES[role] for role in ROLES if role != "model")]


def restricted(files: Iterable[WeightFile]) -> str:
    """What people should know of these files' licences before they use them; empty if all allow any use."""
    what = [ROLES[file.role] for file in files if file.licence == NON_COMMERCIAL]
    if not what:
        return ""
    return f"For non-commercial use only ({NON_COMMERCIAL}): {', '.join(what)}. Every clip passes through them."


# --- names in circulation ---------------------------------------------------------------------------------------------

TOKENIZER = r"spiece\.model|tokenizer\.json"  # for text encoder files without one inside

# What serves a role, best first: patterns for `first_served`; those in one tuple are needed together.
COMPANIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "text_encoder": (
        (r"umt5_xxl_fp16\.safetensors",), (r"umt5_xxl_fp8_e4m3fn_scaled\.safetensors",),
        (r"umt5-xxl-enc-(bf16|fp8_e4m3fn)\.safetensors", TOKENIZER),
        (r"models_t5_umt5-xxl-enc-bf16\.pth", TOKENIZER),
    ),
    "video_vae": ((r"wan2[._]2_vae(_bf16)?\.(safetensors|pth)",),),
    "audio_vae": ((r"v1-16\.pth",), (r"mmaudio_vae_16k_(bf16|fp32)\.safetensors",)),
    "vocoder": ((r"best_netg\.pt",), (r"mmaudio_vocoder_bigvgan_best_netG_(bf16|fp32)\.safetensors",)),
}

# What such files are called otherwise, by whoever repacked them: good enough for a loader's first choice.
_LIKELY = {
    "model": r"(?<![a-z])ovi(?![a-z])(?!.*(lora|vae|vocoder))", "text_encoder": r"umt5",
    "video_vae": r"wan2[._]2.*vae|taew2_2", "audio_vae": r"mmaudio(?!.*(44k|vocoder)).*vae",
    "vocoder": r"vocoder|bigvgan|best_netg",
}

_TEN_SECONDS = re.compile(r"(?<!\d)10[ _-]?s(ec(ond)?s?)?(?![a-z0-9])")
_SECOND_RELEASE = re.compile(r"(?<!\d)960(?!\d)|ovi[ _-]?v?1[._]1(?!\d)")  # both later ones are called Ovi 1.1
_FIRST_RELEASE = re.compile(r"(?<!\d)720(?!\d)|^model(_fp8_e4m3fn)?\.safetensors$|ovi_(video|audio)(?![a-z])")

_WEIGHTS = re.compile(r"\.(safetensors|sft|pth?|ckpt)\Z")
_OURS = re.compile(r"(?<![a-z])ovi(?![a-z])|^model(_fp8_e4m3fn)?\.safetensors$|^model_(720x720|960x960)(?!\d)")
_OTHER_KINDS = re.compile(r"tiny|lora|vae|vocoder|encoder|umt5|latent")


def variant_of(name: str, metadata: Mapping[str, str] | None = None) -> str | None:
    """The released variant that a model file is, by its metadata or else its name; None if neither tells.

    The 960x960 files say so; the 720x720 one came first and is called plainly after the model. Whether the file is a
    model at all is another question, see `model_files`.
    """
    told = (metadata or {}).get(VARIANT_KEY)
    if told in VARIANTS:
        return told
    name = own_name(name).lower()
    if _TEN_SECONDS.search(name):
        return "960x960_10s"
    if _SECOND_RELEASE.search(name):
        return "960x960_5s"
    return "720x720_5s" if _FIRST_RELEASE.search(name) else None


def model_files(variant: str, names: Sequence[str],
                metadata_of: Callable[[str], Mapping[str, str]] = lambda _: {}) -> tuple[str, ...]:
    """The file, or the two halves, among `names` that load as this variant; () if there are none.

    The released file goes before others, a joint one before two halves, and halves of one name before others. A name
    without Ovi in it counts if the file's metadata names the variant. DreamID-Omni and OviDMD are left out: they load,
    but are other models than the one a workflow asks for.
    """
    towers: dict[str, list[str]] = {"": [], "video": [], "audio": []}
    for name in names:
        if _may_be_model(name):
            metadata = metadata_of(name)
            ours = _OURS.search(own_name(name).lower()) or metadata.get(VARIANT_KEY) in VARIANTS
            if ours and variant_of(name, metadata) == variant:
                towers[_tower(name)].append(name)
    if towers[""]:
        return (min(towers[""], key=lambda name: own_name(name).lower() != VARIANTS[variant].checkpoint),)
    halves = [(video, audio) for video in towers["video"] for audio in towers["audio"]]
    return min(halves, key=lambda pair: _unlike(*pair), default=())


def _unlike(video: str, audio: str) -> tuple[bool, bool]:
    """How little two halves belong together: other names, other folders."""
    names = own_name(video).lower().replace("video", "audio"), own_name(audio).lower()
    folders = video.removesuffix(own_name(video)), audio.removesuffix(own_name(audio))
    return names[0] != names[1], folders[0] != folders[1]


def found_for(file: WeightFile, variant: str, names: Sequence[str],
              metadata_of: Callable[[str], Mapping[str, str]]) -> tuple[str, ...]:
    """What among `names` serves in place of a file of the table; () if nothing does."""
    if file.role == "model":
        return model_files(variant, names, metadata_of)
    return first_served(names, COMPANIONS[file.role])


def best_model(names: Sequence[str]) -> tuple[str, ...]:
    """The file, or the two halves, of the first variant that is whole among `names`: the default one, then 10 s."""
    order = sorted(VARIANTS.values(), key=lambda v: (v.name != DEFAULT_VARIANT, -v.area, -v.latent_frames))
    return next((found for variant in order if (found := model_files(variant.name, names))), ())


def first_choice(role: str, names: Sequence[str]) -> str | None:
    """What a loader's list of `names` begins with for a role: a published file, else one that is called alike.

    None if no name tells.
    """
    found = best_model(names) if role == "model" else first_served(names, [each[:1] for each in COMPANIONS[role]])
    if found:
        return found[0]
    return next((name for name in names if re.search(_LIKELY[role], own_name(name).lower())), None)


def _may_be_model(name: str) -> bool:
    name = own_name(name).lower()
    return bool(_WEIGHTS.search(name)) and not _OTHER_KINDS.search(name)


def _tower(name: str) -> str:
    """Which half of a split model a name stands for: "video", "audio", or "" for both."""
    words = [word for word in ("video", "audio") if word in own_name(name).lower()]
    return words[0] if len(words) == 1 else ""
