"""The key layouts Ovi checkpoints circulate in, and their common form: core's names and quantisation records.

| layout | video tower | audio tower | seen in |
|---|---|---|---|
| upstream | `video_model.*` | `audio_model.*` | chetwinlow1/Ovi, DreamID-Omni, fp8 casts |
| split (two files) | root or `video_model.*` | `audio_model.*` or root | Kijai, DeepBeepMeep |
| core | root | `audio_model.*` | converted files |

Any of them may sit below a wrapper (`module.`, `model.diffusion_model.`, ...) and may hold bf16, fp16, fp32, fp8
without scales, fp8 with `.scale_weight`, core's own records (`.comfy_quant`, or in the metadata), or quanto's int8
(`._data` and `._scale`). Nothing here reads files or builds models.
"""

import json
import re

import comfy.utils
import torch

from .files import StateDict, describe_weights

VIDEO_PREFIX, AUDIO_PREFIX = "video_model.", "audio_model."
FP8_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
QUANT_SUFFIXES = (".comfy_quant", ".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale")

WANTED = ("Choose an Ovi checkpoint, such as model_960x960.safetensors from chetwinlow1/Ovi on Hugging Face, in "
          "models/diffusion_models.")

# The first tensor of a tower: video's convolution is a module of its own, audio's the first of a sequence.
_LANDMARK = re.compile(r"(?P<wrapper>.*?)(?P<tower>video_model\.|audio_model\.)?patch_embedding\.(?P<audio>0\.)?weight")


def read_towers(tensors: StateDict, metadata: dict[str, str], name: str) -> tuple[StateDict, str]:
    """Bring the tensors of one file to core's names and quantisation records.

    Returns (tensors, layout), layout one of "upstream", "core", "video tower", "audio tower"; the video tower's names
    start at the root, the audio tower's with `audio_model.`. Raises RuntimeError, naming what the file is instead, if
    it holds neither tower.
    """
    wrapper, video_prefix, audio_prefix = find_towers(tensors)
    if video_prefix is None and audio_prefix is None:
        raise RuntimeError(f"{name} is no Ovi checkpoint: it holds {describe_weights(tensors)}. {WANTED}")
    tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    # Core's quantisation records name layers by their names in the file: resolve them before any key is renamed.
    tensors, _ = comfy.utils.convert_old_quants(tensors, "", metadata=unwrap_records(metadata, wrapper))
    if audio_prefix == "":  # an audio tower alone, at the root
        return finish({AUDIO_PREFIX + key: value for key, value in tensors.items()}), "audio tower"
    if audio_prefix is None:
        layout = "video tower"
    elif video_prefix is None:
        layout = "audio tower"
    else:
        layout = "upstream" if video_prefix else "core"
    return finish({key.removeprefix(VIDEO_PREFIX): value for key, value in tensors.items()}), layout


def find_towers(tensors: StateDict) -> tuple[str, str | None, str | None]:
    """Return (wrapper, video prefix, audio prefix): what stands before each tower's names, None if it is not there."""
    wrapper, video, audio = "", None, None
    for key in tensors:
        match = _LANDMARK.match(key)
        if match is None:
            continue
        wrapper = match["wrapper"]
        if match["audio"]:
            audio = match["tower"] or ""
        else:
            video = match["tower"] or ""
    return wrapper, video, audio


def unwrap_records(metadata: dict[str, str], wrapper: str) -> dict[str, str]:
    """Take the wrapper off the layer names in core's quantisation metadata."""
    records = metadata.get("_quantization_metadata")
    if not records or not wrapper:
        return metadata
    records = json.loads(records)
    records["layers"] = {name.removeprefix(wrapper): value for name, value in records["layers"].items()}
    return {**metadata, "_quantization_metadata": json.dumps(records)}


def finish(tensors: StateDict) -> StateDict:
    """Core's table names, then core's records for what other programs quantised."""
    tensors = {key.replace(".modulation.modulation", ".modulation"): value for key, value in tensors.items()}
    return mark_plain_fp8(convert_quanto_int8(tensors))


def record(layer_format: str, full_precision: bool) -> torch.Tensor:
    """Core's per-layer quantisation record, `<layer>.comfy_quant`."""
    conf = {"format": layer_format, **({"full_precision_matrix_mult": True} if full_precision else {})}
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


def read_record(tensor: torch.Tensor) -> dict:
    """The contents of a `<layer>.comfy_quant` record."""
    return json.loads(bytes(tensor.tolist()))


def convert_quanto_int8(tensors: StateDict) -> StateDict:
    """Rewrite quanto's weight-only int8 (`weight._data` int8, `weight._scale` per output row) as core's int8.

    Products stay in full precision, as quanto computes them. Its activation scales are all 1 and dropped.
    """
    out = {}
    for key, tensor in tensors.items():
        if key.endswith(".weight._data"):
            layer = key.removesuffix(".weight._data")
            out[f"{layer}.weight"] = tensor
            out[f"{layer}.comfy_quant"] = record("int8_tensorwise", full_precision=True)
        elif key.endswith(".weight._scale"):
            out[f"{key.removesuffix('.weight._scale')}.weight_scale"] = tensor.float()
        elif not (key.endswith((".input_scale", ".output_scale"))
                  and f"{key.rpartition('.')[0]}.weight._data" in tensors):
            out[key] = tensor
    return out


def mark_plain_fp8(tensors: StateDict) -> StateDict:
    """Give fp8 weights without scales core's record, with scale 1 and full-precision products.

    Core would otherwise cast norms, biases and tables to fp8 with them, which doubles the error. fp8 tensors that no
    linear layer multiplies with (convolutions, tables) become bf16.
    """
    out = dict(tensors)
    for key, tensor in tensors.items():
        layer = key.removesuffix(".weight")
        if tensor.dtype not in FP8_FORMATS or f"{layer}.comfy_quant" in tensors or key.endswith(QUANT_SUFFIXES):
            continue
        if key.endswith(".weight") and tensor.ndim == 2:
            out[f"{layer}.comfy_quant"] = record(FP8_FORMATS[tensor.dtype], full_precision=True)
            out[f"{layer}.weight_scale"] = torch.tensor(1.0)
        else:
            out[key] = tensor.to(torch.bfloat16)
    return out
