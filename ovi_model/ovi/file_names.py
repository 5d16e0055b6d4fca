"""The names under which the weights of Ovi and of its companions circulate. Only the standard library, no relatives:
`tools/dev.py` reads this file before there is a ComfyUI.
"""

import re
from collections.abc import Iterable, Sequence

ROLES = {
    "model": "Ovi model", "text_encoder": "UMT5-XXL text encoder", "video_vae": "Wan 2.2 video VAE",
    "audio_vae": "MMAudio 16 kHz VAE", "vocoder": "BigVGAN vocoder",
}
TOKENIZER = r"spiece\.model|tokenizer\.json"  # for text encoder files without one inside

_JOINT = r"(?!.*(tiny|lora|vae|video|audio))"  # not one of the towers alone, and not another kind of file
_END = r"\.(safetensors|sft|pth?|ckpt)"
# What serves a role, best first: names in circulation as patterns for the whole name without its folder, case ignored;
# those in one tuple are needed together. Models are listed per variant, the rest per role. DreamID-Omni and OviDMD are
# left out: they load, but are other models than the one a workflow asks for.
ACCEPTED: dict[str, tuple[tuple[str, ...], ...]] = {
    "720x720_5s": (
        (r"model\.safetensors",), (r"model_fp8_e4m3fn\.safetensors",),
        (rf"{_JOINT}(.*[-_.])?ovi[-_.](.*[-_.])?720x720.*{_END}",),
        (r"wan_?2_[12]_ovi_video_.*\.safetensors", r"wan_?2_[12]_ovi_audio_.*\.safetensors"),
        (r"wan2\.2_ovi_video_10b_.*\.safetensors", r"wan2\.2_ovi_audio_10b_.*\.safetensors"),
    ),
    "960x960_5s": (
        (r"model_960x960\.safetensors",), (rf"{_JOINT}(?!.*10s)(.*[-_.])?ovi[-_.](.*[-_.])?960x960.*{_END}",),
        (r"(?!.*10s)wan2\.2_ovi1_1_video_10b_.*\.safetensors", r"(?!.*10s)wan2\.2_ovi1_1_audio_10b_.*\.safetensors"),
    ),
    "960x960_10s": (
        (r"model_960x960_10s\.safetensors",), (rf"{_JOINT}(.*[-_.])?ovi[-_.](.*[-_.])?960x960_10s.*{_END}",),
        (r"wan2\.2_ovi1_1_(?=.*10s).*video.*\.safetensors", r"wan2\.2_ovi1_1_(?=.*10s).*audio.*\.safetensors"),
    ),
    "text_encoder": (
        (r"umt5_xxl_fp16\.safetensors",), (r"umt5_xxl_fp8_e4m3fn_scaled\.safetensors",),
        (r"umt5-xxl-enc-(bf16|fp8_e4m3fn)\.safetensors", TOKENIZER),
        (r"models_t5_umt5-xxl-enc-bf16\.pth", TOKENIZER),
    ),
    "video_vae": ((r"wan2[._]2_vae(_bf16)?\.(safetensors|pth)",),),
    "audio_vae": ((r"v1-16\.pth",), (r"mmaudio_vae_16k_(bf16|fp32)\.safetensors",)),
    "vocoder": ((r"best_netg\.pt",), (r"mmaudio_vocoder_bigvgan_best_netg_(bf16|fp32)\.safetensors",)),
}


def first_served(names: Sequence[str], alternatives: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The first alternative whose files are all among `names`; () if none is."""
    for patterns in alternatives:
        found = [next((name for name in names if re.fullmatch(pattern, re.split(r"[/\\]", name)[-1], re.I)), None)
                 for pattern in patterns]
        if all(found):
            return tuple(name for name in found if name)
    return ()
