"""Loader nodes. The video VAE may also come from the stock 'Load VAE'.

Each fingerprints its files by size and time, so that a file replaced under its name is loaded again.
"""

import os
from functools import lru_cache
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..ovi_model.files.names import printable
from ..ovi_model.files.safetensors_header import is_safetensors, raw_header
from ..ovi_model.media import audio_vae, video_vae
from ..ovi_model.ovi import checkpoint
from ..ovi_model.ovi.catalogue import first_choice
from ..ovi_model.ovi.quant_recipe import FORMATS
from ..ovi_model.ovi.variants import DEFAULT_VARIANT, VARIANTS
from ..ovi_model.text import umt5
from .inputs import check_inputs, file_path
from .preview import follow
from .report import report

WEIGHT_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32,
                 **{name: name for name in FORMATS}}
AUTO_TOKENIZER = AUTO_SECOND = AUTO_VARIANT = "automatic"
SINGLE_FILE = "none (single merged file)"


def stamp(path: str | Path | None) -> tuple[str, int, int] | None:
    """What tells a file from the next under its name: path, bytes, time. None if there is no file.

    Whether that is an error the loader says, in words.
    """
    try:
        found = os.stat(path) if path else None
    except (OSError, ValueError):
        return None
    return (str(path), found.st_size, found.st_mtime_ns) if found else None


def stamps(folder: str, *names: str | None) -> tuple:
    """The stamps of files in one of ComfyUI's model folders; names that are None or no file count as absent."""
    return tuple(stamp(folder_paths.get_full_path(folder, name) if name else None) for name in names)


class OviModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = folder_paths.get_filename_list("diffusion_models")
        return io.Schema(
            node_id="OviModelLoader",
            display_name="Load Ovi Model",
            search_aliases=["load checkpoint", "load diffusion model", "audio video model", "video with sound model",
                            "text to video model", "ovi 1.1", "character ai"],
            category="Ovi/loaders",
            description="Loads an Ovi checkpoint, one joint file or a video and an audio file, as a ComfyUI MODEL.",
            inputs=[
                io.Combo.Input("model_name", options=files, default=first_choice("model", files), tooltip=(
                    "Ovi checkpoint in models/diffusion_models: model.safetensors (720x720, 5 s), "
                    "model_960x960.safetensors, model_960x960_10s.safetensors, a quantised copy of one, or the video "
                    "half of a split model.")),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", advanced=True, tooltip=(
                    "Precision weights are kept in. default follows the file and the GPU; bf16 halves memory against "
                    "fp32. The others quantise the blocks while loading: int8 halves memory again and is closest to "
                    "bf16; fp8_scaled, mxfp8 and nvfp4 (a quarter, coarse). int8 also multiplies in 8 bits, the others "
                    "in their format on GPUs that can. tools/convert.py writes the same to a file, which loads sooner. "
                    "float16 is not offered: it overflows on this model and gives black frames.")),
                io.Combo.Input("second_file", options=[AUTO_SECOND, *files], default=AUTO_SECOND, optional=True,
                               advanced=True, tooltip=(
                    "The other half of a split model (its audio file). automatic takes the file beside the first whose "
                    "name differs only in 'video' and 'audio'; joint files need none.")),
                io.Combo.Input("variant", options=[AUTO_VARIANT, *VARIANTS], default=AUTO_VARIANT, optional=True,
                               advanced=True, tooltip=(
                    "Which of Ovi's three releases the file is: 720x720 pixels and 5 s, 960x960 and 5 s, or 960x960 "
                    "and 10 s. automatic asks its metadata, then its name; the weights look alike. Prompt, latent and "
                    "sampler nodes go by it.")),
            ],
            outputs=[
                io.Model.Output(tooltip="The fused model, for 'Ovi Sampler' and ComfyUI's own samplers."),
                io.Combo.Output("variant", display_name="variant", options=list(VARIANTS), tooltip=(
                    "The variant found or set. Connect it to 'variant' of 'Ovi Prompt', 'Ovi Empty Latent' and 'Ovi "
                    "First Frame' so that all agree.")),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model_name=None, second_file=None, **_):
        own, second = stamps("diffusion_models", model_name, second_file)
        if own and not second:
            second = stamp(checkpoint.find_partner(own[0]))
        return own, second

    @classmethod
    def execute(cls, model_name, weight_dtype, second_file=AUTO_SECOND, variant=AUTO_VARIANT) -> io.NodeOutput:
        check_inputs(cls, weight_dtype=weight_dtype, variant=variant)
        path = file_path("diffusion_models", model_name)
        second = None
        if second_file != AUTO_SECOND:
            second = file_path("diffusion_models", second_file)
        model, found = checkpoint.load_model(
            path, WEIGHT_DTYPES[weight_dtype], second, None if variant == AUTO_VARIANT else variant)
        follow(model)
        warnings = [] if found.variant else ["The name does not tell which variant this is; set variant in this node."]
        return io.NodeOutput(model, found.variant or DEFAULT_VARIANT, ui=report(cls, [str(found)], warnings))


class OviTextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = folder_paths.get_filename_list("text_encoders")
        return io.Schema(
            node_id="OviTextEncoderLoader",
            display_name="Load Ovi Text Encoder",
            search_aliases=["load clip", "umt5", "t5", "tokenizer"],
            category="Ovi/loaders",
            description="Loads the UMT5-XXL text encoder, in ComfyUI's layout or in Wan's own.",
            inputs=[
                io.Combo.Input("text_encoder_name", options=files, default=first_choice("text_encoder", files),
                               tooltip=(
                    "UMT5-XXL in models/text_encoders: umt5_xxl_fp16.safetensors, "
                    "umt5_xxl_fp8_e4m3fn_scaled.safetensors or Wan's models_t5_umt5-xxl-enc-bf16.pth. A plain T5-XXL "
                    "does not work.")),
                io.Combo.Input("tokenizer_name", options=tokenizer_options(), default=AUTO_TOKENIZER, advanced=True,
                               tooltip=(
                    "Tokenizer for files without one inside (Wan's own .pth): spiece.model, tokenizer.json, or a "
                    "safetensors encoder that has one inside. automatic looks inside the file, beside it, and in "
                    "models/text_encoders.")),
            ],
            outputs=[io.Clip.Output(tooltip="For 'Ovi Prompt' or 'CLIP Text Encode'.")],
        )

    @classmethod
    def validate_inputs(cls, tokenizer_name=AUTO_TOKENIZER):
        """Core's check of this list, in words: workflows saved when it offered every file may name any of them."""
        if tokenizer_name in tokenizer_options():
            return True
        name = str(tokenizer_name)
        there = folder_paths.get_full_path("text_encoders", name) is not None
        return (f"{printable(name)} {'holds no tokenizer' if there else 'is not in models/text_encoders'}. Choose "
                f"{AUTO_TOKENIZER}, which looks inside and beside the encoder, or a spiece.model or tokenizer.json.")

    @classmethod
    def fingerprint_inputs(cls, text_encoder_name=None, tokenizer_name=None):
        if tokenizer_name != AUTO_TOKENIZER:
            return stamps("text_encoders", text_encoder_name, tokenizer_name)
        return stamps("text_encoders", text_encoder_name), tuple(map(stamp, tokenizer_files().values()))

    @classmethod
    def execute(cls, text_encoder_name, tokenizer_name) -> io.NodeOutput:
        path = file_path("text_encoders", text_encoder_name)
        tokenizer = None
        if tokenizer_name != AUTO_TOKENIZER:
            tokenizer = file_path("text_encoders", tokenizer_name)
        return io.NodeOutput(umt5.load_text_encoder(path, tokenizer))


def tokenizer_options() -> list[str]:
    """What in models/text_encoders can be a tokenizer, after the automatic choice."""
    inside = [name for name in folder_paths.get_filename_list("text_encoders") if _has_tokenizer(
        stamp(folder_paths.get_full_path("text_encoders", name)))]
    return [AUTO_TOKENIZER, *sorted(tokenizer_files()), *inside]


def tokenizer_files() -> dict[str, str]:
    """Names and paths of the tokenizers in models/text_encoders; core's own lists leave their endings out."""
    found: dict[str, str] = {}
    for folder in folder_paths.get_folder_paths("text_encoders"):
        files, _ = folder_paths.recursive_search(folder, [".git"])
        for name in sorted(filter(_names_tokenizer, files)):
            found.setdefault(name, os.path.join(folder, name))
    return found


def _names_tokenizer(path: str) -> bool:
    name = os.path.basename(path).lower()
    return name.endswith(".model") or ("tokenizer" in name and name.endswith(".json") and "config" not in name)


@lru_cache(maxsize=256)
def _has_tokenizer(file: tuple[str, int, int] | None) -> bool:
    """Whether a file, by its stamp, is a safetensors encoder with a tokenizer inside: read off its header alone."""
    if file is None or not is_safetensors(file[0]):
        return False
    try:
        header = raw_header(Path(file[0]))
    except (OSError, ValueError):
        return False
    return any(f'"{name}"'.encode() in header for name in ("spiece_model", "tokenizer_json"))


def audio_vae_input(name: str, files: list[str]):
    return io.Combo.Input(name, options=files, default=first_choice("audio_vae", files), tooltip=(
        "What turns the model's sound into a spectrum: MMAudio's 16 kHz VAE in models/vae, v1-16.pth or "
        "mmaudio_vae_16k_bf16.safetensors. The 44 kHz one does not fit Ovi."))


def vocoder_input(files: list[str]):
    return io.Combo.Input("vocoder_name", options=[*files, SINGLE_FILE], default=first_choice("vocoder", files),
                          tooltip=(
        "What turns the spectrum into a waveform: the BigVGAN vocoder in models/vae, best_netG.pt or "
        "mmaudio_vocoder_bigvgan_best_netG_bf16.safetensors."))


def load_sound(vae_name: str, vocoder_name: str):
    """The audio VAE of two files in models/vae, or of one that holds both."""
    vae = file_path("vae", vae_name)
    return audio_vae.load_audio_vae(vae, None if vocoder_name == SINGLE_FILE else file_path("vae", vocoder_name))


class OviAudioVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = folder_paths.get_filename_list("vae")
        return io.Schema(
            node_id="OviAudioVAELoader",
            display_name="Load Ovi Audio VAE",
            search_aliases=["mmaudio", "vocoder", "bigvgan", "sound decoder", "load audio vae"],
            category="Ovi/loaders",
            description="Loads MMAudio's 16 kHz VAE and its BigVGAN vocoder, two files, as one ComfyUI VAE. MMAudio's "
                        "checkpoints are CC-BY-NC 4.0: for non-commercial use only.",
            inputs=[
                audio_vae_input("vae_name", files), vocoder_input(files),
            ],
            outputs=[io.Vae.Output(tooltip="For 'Ovi Decode', 'VAE Decode Audio' and 'VAE Encode Audio'.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name=None, vocoder_name=None):
        return stamps("vae", vae_name, vocoder_name)

    @classmethod
    def execute(cls, vae_name, vocoder_name) -> io.NodeOutput:
        return io.NodeOutput(load_sound(vae_name, vocoder_name))


class OviVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = folder_paths.get_filename_list("vae")
        return io.Schema(
            node_id="OviVAELoader",
            display_name="Load Ovi VAEs",
            search_aliases=["load vae", "wan 2.2 vae", "mmaudio", "vocoder", "bigvgan", "audio video vae"],
            category="Ovi/loaders",
            description="Loads what turns latents into picture and sound, and back: the Wan 2.2 VAE, MMAudio's VAE and "
                        "its vocoder. MMAudio's checkpoints are CC-BY-NC 4.0: for non-commercial use only.",
            inputs=[
                io.Combo.Input("video_vae_name", options=files, default=first_choice("video_vae", files), tooltip=(
                    "What turns the model's picture into frames: the Wan 2.2 VAE in models/vae, "
                    "wan2.2_vae.safetensors. The Wan 2.1 VAE does not fit Ovi.")),
                audio_vae_input("audio_vae_name", files), vocoder_input(files),
            ],
            outputs=[
                io.Vae.Output(display_name="video_vae", tooltip="For 'Ovi Decode', 'Ovi First Frame' or 'VAE Decode'."),
                io.Vae.Output(display_name="audio_vae", tooltip=(
                    "For 'Ovi Decode', 'VAE Decode Audio' and 'VAE Encode Audio'.")),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, video_vae_name=None, audio_vae_name=None, vocoder_name=None):
        return stamps("vae", video_vae_name, audio_vae_name, vocoder_name)

    @classmethod
    def execute(cls, video_vae_name, audio_vae_name, vocoder_name) -> io.NodeOutput:
        picture = file_path("vae", video_vae_name)
        sound = load_sound(audio_vae_name, vocoder_name)  # the smaller files: a wrong one is said sooner
        return io.NodeOutput(video_vae.load_video_vae(picture), sound)
