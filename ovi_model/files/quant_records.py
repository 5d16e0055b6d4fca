"""Core's quantisation records, `<layer>.comfy_quant`: reading, checking, and making them for what others quantised.

Works on names and tensors of any model. Nothing here reads files or builds models.
"""

import json
from collections.abc import Mapping

import comfy.utils
import torch
from comfy.quant_ops import QUANT_ALGOS

from .reader import StateDict

FP8_FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
FULL_PRECISION = {"full_precision_matrix_mult": True}
QUANT_SUFFIXES = (".comfy_quant", ".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale")


def unwrap_records(metadata: dict[str, str], wrapper: str) -> dict[str, str]:
    """Take the wrapper off the layer names in core's quantisation metadata."""
    records = metadata.get("_quantization_metadata")
    if not records or not wrapper:
        return metadata
    records = json.loads(records)
    records["layers"] = {name.removeprefix(wrapper): value for name, value in records["layers"].items()}
    return {**metadata, "_quantization_metadata": json.dumps(records)}


def resolve_records(tensors: StateDict, metadata: dict[str, str], name: str, wrapper: str = "") -> StateDict:
    """Core's older quantisation records, and those in the metadata, as its `.comfy_quant` tensors.

    They go by the file's own layer names, but for a wrapper. Raises RuntimeError if they cannot be read.
    """
    try:
        return comfy.utils.convert_old_quants(tensors, "", metadata=unwrap_records(metadata, wrapper))[0]
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise RuntimeError(f"{name} is damaged: its quantisation records cannot be read ({type(error).__name__}). "
                           "Download it again.") from error


def encode_record(conf: Mapping[str, object]) -> torch.Tensor:
    """Core's per-layer quantisation record, `<layer>.comfy_quant`: JSON as bytes."""
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


def read_record(tensor: torch.Tensor) -> dict:
    """The contents of a `<layer>.comfy_quant` record."""
    return json.loads(bytes(tensor.tolist()))


def convert_quanto_int8(tensors: StateDict) -> StateDict:
    """Rewrite quanto's weight-only int8 (`weight._data` int8, `weight._scale` per output row) as core's int8.

    The record asks for products in full precision, as quanto computes them; ComfyUI 0.30 multiplies in int8 all the
    same. Activation scales, all 1, are dropped.
    """
    out = {}
    for key, tensor in tensors.items():
        if key.endswith(".weight._data"):
            layer = key.removesuffix(".weight._data")
            out[f"{layer}.weight"] = tensor
            out[f"{layer}.comfy_quant"] = encode_record({"format": "int8_tensorwise", **FULL_PRECISION})
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
            out[f"{layer}.comfy_quant"] = encode_record({"format": FP8_FORMATS[tensor.dtype], **FULL_PRECISION})
            out[f"{layer}.weight_scale"] = torch.tensor(1.0)
        else:
            out[key] = tensor.to(torch.bfloat16)
    return out


def check_records(tensors: StateDict, name: str) -> None:
    """Raise RuntimeError unless every `.comfy_quant` record is one that core reads, with the tensors it needs.

    Core finds out only while it builds the model, or while that runs.
    """
    for key in tensors:
        if not key.endswith(".comfy_quant"):
            continue
        layer = key.removesuffix(".comfy_quant")
        conf = _conf(tensors[key])
        problem = "an unreadable quantisation record" if conf is None else _problem(tensors, layer, conf)
        if conf is None or problem:
            raise RuntimeError(f"{name} is damaged: {layer} has {problem}. Download it again.")
        if conf["format"] not in QUANT_ALGOS:
            raise RuntimeError(f"{name} stores {layer} as '{conf['format'][:40]}', which this ComfyUI does not read "
                               f"(it reads {', '.join(QUANT_ALGOS)}): update ComfyUI, or choose another file.")


def _conf(record: torch.Tensor) -> dict | None:
    """What a record says; None if it is no record."""
    if record.dtype != torch.uint8 or record.ndim != 1:
        return None
    try:
        conf = read_record(record)
    except (ValueError, RecursionError):
        return None
    return conf if isinstance(conf, dict) and isinstance(conf.get("format"), str) else None


def _problem(tensors: StateDict, layer: str, conf: dict) -> str | None:
    """What is wrong with a quantised layer, as the object of "has"; None if nothing is."""
    weight, scale = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.weight_scale")
    if weight is None or weight.ndim != 2:
        return "a quantisation record but no matrix"
    if conf["format"] not in QUANT_ALGOS:
        return None
    if weight.dtype.itemsize > 1 and not (conf["format"] in FP8_FORMATS.values() and weight.is_floating_point()):
        return f"{weight.dtype} weights where its record says {conf['format']}"
    options = {**(conf["params"] if isinstance(conf.get("params"), dict) else {}), **conf}
    if not isinstance(options.get("convrot_groupsize", 1), int) or not isinstance(options.get("linear_dtype", ""), str):
        return "an unreadable quantisation record"
    if scale is None or not _scales(conf["format"], weight, scale):
        return f"no scales that fit its {weight.shape[0]} rows of {weight.shape[1]}"
    second = tensors.get(f"{layer}.weight_scale_2")
    if conf["format"] == "nvfp4" and (second is None or second.numel() != 1 or not second.is_floating_point()):
        return "no scale of the whole matrix"
    return None


def _scales(algorithm: str, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the scales are as many as the format needs: one, one a row, or one a group of weights."""
    group = QUANT_ALGOS[algorithm].get("group_size")
    if group is None:
        return scale.is_floating_point() and (algorithm == "convrot_w4a4" or scale.numel() in (1, weight.shape[0]))
    weights = weight.numel() * (2 if weight.dtype == torch.uint8 else 1)
    return scale.dtype.itemsize == 1 and weights <= scale.numel() * group


def fits(tensors: StateDict, key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has a shape, or holds a matrix of that shape in the format its record says."""
    found, record = tuple(tensors[key].shape), tensors.get(f"{key.removesuffix('.weight')}.comfy_quant")
    conf = None if record is None or not key.endswith(".weight") or len(shape) != 2 else _conf(record)
    if conf is None or conf["format"] in FP8_FORMATS.values() or conf["format"] == "int8_tensorwise":
        return found == shape
    packed = 1 if conf["format"] == "mxfp8" else 2  # weights a byte; sides may be padded up to a tile
    return len(found) == 2 and all(
        wanted <= side < wanted + 128 for side, wanted in zip((found[0], packed * found[1]), shape, strict=True))
