"""Ovi's text encoder, UMT5-XXL, from either layout in circulation to a ComfyUI CLIP, and prompts to embeddings.

Two layouts are read: ComfyUI's (`encoder.block.N...`, the sentencepiece model inside as `spiece_model`; fp16, bf16,
fp32 or anything core quantises) and Wan's own (`blocks.N...`, upstream's `models_t5_umt5-xxl-enc-bf16.pth`), whose
tokenizer is a separate file. Both become core's UMT5 classes, with every size taken from the weights.

Upstream encodes at most 512 tokens, the end token included, and hands over the true length (`T5EncoderModel` of
`t5.py`). ComfyUI's weight syntax has no place here: brackets are part of what people say.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.t5
import comfy.text_encoders.wan
import comfy.utils
import torch

from ..files.identify import describe_weights
from ..files.loading import ALWAYS_ALLOCATED, own_memory, require_all, storages
from ..files.names import printable
from ..files.quant_records import check_records, resolve_records
from ..files.reader import StateDict, load_weights
from .tokenizer import MAX_TOKENS, TEXT_MODEL, build_tokenizer, tokenizer_data

TENSORS_A_LAYER = 8  # of the 10 there are, so that a few missing ones are named
BUCKETS = 32  # of relative positions; core has no other number

WANTED = ("Choose a UMT5-XXL encoder, such as umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors of "
          "Comfy-Org/Wan_2.1_ComfyUI_repackaged, in models/text_encoders.")

# Wan's names to ComfyUI's, for everything below blocks.N and for what stands outside the blocks.
BLOCK_NAMES = {
    "attn.": "layer.0.SelfAttention.",
    "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
    "norm1.": "layer.0.layer_norm.",
    "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
    "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
    "ffn.fc2.": "layer.1.DenseReluDense.wo.",
    "norm2.": "layer.1.layer_norm.",
}
OUTER_NAMES = {"token_embedding.": "shared.", "norm.": "encoder.final_layer_norm."}


@dataclass(frozen=True)
class TextInfo:
    """How a text was tokenised: tokens used (end token included), and what the limit cut off its end."""

    tokens: int
    cut_tokens: int = 0
    cut_text: str = ""


def load_text_encoder(path: str, tokenizer_path: str | None = None, model_options: dict | None = None) -> comfy.sd.CLIP:
    """Load a UMT5 encoder.

    path: `.safetensors`, `.pth` or `.pt` in ComfyUI's or Wan's layout. tokenizer_path: `spiece.model`,
    `tokenizer.json`, a folder with one of them, or a UMT5 file in ComfyUI's layout; None takes the one inside the file
    or looks for one beside it and in the text_encoders folders. model_options: as in core's loader (`load_device`,
    `offload_device`).
    Raises RuntimeError with a sentence for the user if the file is no UMT5 encoder or has no tokenizer.
    """
    return _load(path, tokenizer_path, model_options or {}, disable_dynamic=False)


def reload_patcher(path: str, tokenizer_path: str | None, model_options: dict, disable_dynamic: bool = False):
    """Load the same file again, for core's multi-GPU clones and its non-dynamic delegates."""
    return _load(path, tokenizer_path, model_options, disable_dynamic).patcher


def _load(path: str, tokenizer_path: str | None, model_options: dict, disable_dynamic: bool) -> comfy.sd.CLIP:
    name = printable(Path(path).name)
    weights, metadata = load_weights(path)
    _check_family(weights, name)
    if model_options.get("custom_operations") is None:  # quantisation records use the file's names: resolve them first
        weights = resolve_records(weights, metadata, name)
    weights = to_core_layout(weights)
    check_records(weights, name)
    config = read_config(weights, name)
    require_all(weights, core_model(config, "meta"), name)
    tokenizer = build_tokenizer(tokenizer_data(weights, path, tokenizer_path), config["vocab_size"], name)

    target = comfy.supported_models_base.ClipTarget(
        lambda **_: tokenizer,
        comfy.text_encoders.wan.te(**comfy.text_encoders.sd3_clip.t5_xxl_detect(weights)))
    clip = comfy.sd.CLIP(
        target, state_dict=[weights], parameters=comfy.utils.calculate_parameters(weights),
        model_options={**model_options, f"{TEXT_MODEL}_model_config": config}, disable_dynamic=disable_dynamic)
    if not clip.patcher.is_dynamic():
        own_memory(clip.cond_stage_model, storages(weights.values()))
    clip.patcher.cached_patcher_init = (reload_patcher, (path, tokenizer_path, model_options))
    return clip


# --- what the file is -------------------------------------------------------------------------------------------------


def _check_family(weights: StateDict, name: str) -> None:
    """Raise RuntimeError unless the weights are a UMT5 encoder: a T5 with a relative position table in every layer."""
    if "blocks.0.pos_embedding.embedding.weight" in weights and "token_embedding.weight" in weights:
        return
    tables = [key for key in weights if key.endswith("SelfAttention.relative_attention_bias.weight")]
    layers = sum(1 for key in weights if re.fullmatch(r"encoder\.block\.\d+\.layer\.0\.layer_norm\.weight", key))
    encoder_tables = [key for key in tables if key.startswith("encoder.")]
    if layers and len(encoder_tables) == layers:
        return
    raise RuntimeError(f"{name} is {describe_weights(weights)}, not the UMT5 text encoder Ovi needs. {WANTED}")


def to_core_layout(weights: StateDict) -> StateDict:
    """Rename Wan's keys to ComfyUI's; keys in ComfyUI's layout stay as they are."""
    return {_core_name(name): value for name, value in weights.items()}


def _core_name(name: str) -> str:
    block = re.match(r"blocks\.(\d+)\.", name)
    rest = name[block.end():] if block else name
    for old, new in (BLOCK_NAMES if block else OUTER_NAMES).items():
        if rest.startswith(old):
            return f"{f'encoder.block.{block[1]}.' if block else ''}{new}{rest[len(old):]}"
    return name


def read_config(weights: StateDict, name: str) -> dict[str, int]:
    """`derive_config` of a file; raises RuntimeError if it lacks what tells the sizes, or most of what they imply."""
    try:
        config = derive_config(weights)
    except KeyError as error:
        raise RuntimeError(
            f"{name} is damaged or incomplete: it lacks the tensor {error}. Download it again.") from error
    except (IndexError, ZeroDivisionError) as error:
        raise RuntimeError(f"{name} is damaged: a tensor that tells the model's size has the wrong number of "
                           f"dimensions ({error}). Download it again.") from error
    if len(weights) < TENSORS_A_LAYER * config["num_layers"]:
        raise RuntimeError(f"{name} is damaged or incomplete: it has {len(weights)} tensors for "
                           f"{config['num_layers']} layers. Download it again.")
    return config


def derive_config(weights: StateDict) -> dict[str, int]:
    """The sizes core's T5 wants, from a state dict in ComfyUI's layout; the rest of core's UMT5 settings stay."""
    layer = "encoder.block.0.layer"
    heads = weights[f"{layer}.0.SelfAttention.relative_attention_bias.weight"].shape[1]
    indices = [int(match[1]) for match in (re.match(r"encoder\.block\.(\d+)\.", key) for key in weights) if match]
    return {
        "vocab_size": weights["shared.weight"].shape[0],
        "d_model": weights["shared.weight"].shape[1],
        "d_ff": weights[f"{layer}.1.DenseReluDense.wi_0.weight"].shape[0],
        "d_kv": weights[f"{layer}.0.SelfAttention.q.weight"].shape[0] // heads,
        "num_heads": heads,
        "num_layers": max(indices) + 1,
    }


def core_model(config: dict[str, int], device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Core's UMT5 encoder at the given sizes, without a tokenizer or memory management.

    On the meta device it only tells names and shapes, and has all of them (see `loading.ALWAYS_ALLOCATED`).
    """
    operations = ALWAYS_ALLOCATED if device == "meta" else comfy.ops.manual_cast
    umt5 = {**config, "model_type": "umt5", "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True}
    return comfy.text_encoders.t5.T5(umt5, dtype, device, operations)


# --- prompts ----------------------------------------------------------------------------------------------------------


def tokenize(clip: comfy.sd.CLIP, text: str) -> tuple[dict, TextInfo]:
    """Tokens for `clip.encode_from_tokens` (cut to 511 and the end token, not padded) and what they are.

    Core and upstream pad every text to 512 tokens, encode them all with the padding masked, and only the rows of the
    text's own tokens are used: here a short text costs less. The text counts as it is: no weights, no backslash
    escapes. Raises ValueError if the CLIP is no UMT5 encoder or the text no text, RuntimeError if the tokenizer fails.
    """
    if not isinstance(clip.tokenizer, comfy.text_encoders.wan.WanT5Tokenizer):
        raise ValueError(f"This CLIP ({type(clip.cond_stage_model).__name__}) is not the UMT5 text encoder Ovi needs; "
                         "connect 'Load Ovi Text Encoder', or 'Load CLIP' with type wan.")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError("The text holds half of a character (a lone surrogate), which no tokenizer reads; delete what "
                         "is shown as a box or a question mark, and type it again.")
    literal = text.replace("\\(", "\\\\(").replace("\\)", "\\\\)")  # core would drop a backslash before a bracket
    tokens = clip.tokenize(literal, disable_weights=True)
    inner = getattr(clip.tokenizer, clip.tokenizer.clip)
    ids = [int(token) for token, _ in tokens[TEXT_MODEL][0]]
    while ids and ids[-1] == inner.pad_token:
        ids.pop()
    strange = next((token for token in ids if token not in inner.inv_vocab), None)
    if strange is not None:  # on a GPU a wrong index would end CUDA for the whole process
        raise RuntimeError(f"The tokenizer made the token {strange} of this text, which is none of its vocabulary. "
                           "Download spiece.model or tokenizer.json of google/umt5-xxl again.")
    ids = ids[:-1]  # the end token
    kept, cut = ids[:MAX_TOKENS - 1], ids[MAX_TOKENS - 1:]
    info = TextInfo(len(kept) + 1, len(cut), clip.tokenizer.decode(cut) if cut else "")
    return {**tokens, TEXT_MODEL: [[(token, 1.0) for token in (*kept, inner.end_token)]]}, info


def encode_conditioning(clip: comfy.sd.CLIP, text: str) -> tuple[list, TextInfo]:
    """CONDITIONING of a text as core's CLIPTextEncode makes it, with the hooks that are set on the CLIP.

    One entry [embeddings, options]; for a CLIP whose hooks follow a schedule one for each part of it, the same parts
    for every text. Embeddings are [1, L, D], L the true length with the end token (1 for an empty text, at most 512).
    The caller cleans the text first (`prompt.clean_for_tokenizer`). They equal the first L rows of stock CLIPTextEncode
    on a text without weight syntax, but for rounding (1e-6 of their norm). ValueError if the CLIP is no UMT5 encoder.
    """
    tokens, info = tokenize(clip, text)
    return clip.encode_from_tokens_scheduled(tokens), info
