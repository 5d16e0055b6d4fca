"""Every weight file of the model in circulation, as a small random file in that exact layout: ROWS."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import comfy.model_management
import torch
from safetensors.torch import save_file
from tiny.checkpoint import draw_weights
from tiny.sizes import Sizes, core_layout
from torch import Tensor

Weights = dict[str, Tensor]
SIZES = Sizes(blocks=2)
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


# --- the ways a model is quantised: each returns (what the file holds, the numbers that stand for) --------------------

def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(".weight")


def plain_fp8(weights: Weights, dtype: torch.dtype = FP8) -> tuple[Weights, Weights]:
    """rkfg: everything but names with 'norm' or 'bias', convolutions and tables too; no scales."""
    stored = {name: tensor.to(BF16 if "norm" in name or "bias" in name else dtype) for name, tensor in weights.items()}
    return stored, cast(stored, FP32)


def scaled(weights: Weights, suffix: str) -> tuple[Weights, Weights, list[str]]:
    """The blocks' matrices as fp8 with one scale each, the rest in bf16; and the names of those layers."""
    stored, meant, layers = cast(weights, BF16), cast(weights, FP32), []
    for name, tensor in weights.items():
        if ".blocks." in f".{name}" and is_matrix(name, tensor):
            scale = tensor.float().abs().max() / 448
            stored[name] = (tensor.float() / scale).to(FP8)
            meant[name] = stored[name].float() * scale
            layers.append(name.removesuffix(".weight"))
            stored[f"{layers[-1]}.{suffix}"] = scale
    return stored, meant, layers


def kijai_fp8(weights: Weights, marker: Tensor) -> tuple[Weights, Weights]:
    stored, meant, _ = scaled(weights, "scale_weight")
    return {**stored, "scaled_fp8": marker.to(FP8)}, meant


def quanto(weights: Weights) -> tuple[Weights, Weights]:
    """DeepBeepMeep: every linear layer as int8 with one bf16 scale a row, and activation scales that are all 1."""
    stored, meant = cast(weights, BF16), cast(weights, FP32)
    for name, tensor in weights.items():
        if is_matrix(name, tensor):
            scale = (tensor.float().abs().amax(dim=1, keepdim=True) / 127).to(BF16)
            data = (tensor.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
            layer = name.removesuffix(".weight")
            del stored[name]
            stored |= {f"{layer}.weight._data": data, f"{layer}.weight._scale": scale,
                       f"{layer}.input_scale": torch.tensor(1.0), f"{layer}.output_scale": torch.tensor(1.0)}
            meant[name] = data.float() * scale.float()
    return stored, meant


def comfy_quant(weights: Weights) -> tuple[Weights, Weights]:
    """Core's newer records, a tensor beside each layer."""
    stored, meant, layers = scaled(weights, "weight_scale")
    return stored | {f"{layer}.comfy_quant": record() for layer in layers}, meant


def record() -> Tensor:
    conf = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)


# --- the ways a model is laid out: each writes files and returns the arguments of load_model ------------------------

def video_half(weights: Weights) -> Weights:
    return {name.removeprefix("video_model."): t for name, t in weights.items() if name.startswith("video_model.")}


def audio_half(weights: Weights, prefix: str = "audio_model.") -> Weights:
    return {name.replace("audio_model.", prefix): t for name, t in weights.items() if name.startswith("audio_model.")}


def write(path: Path, weights: Weights, metadata: dict[str, str] | None = None) -> str:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path, metadata)
    else:
        torch.save(weights, path)
    return str(path)


Written = tuple[str, ...]
Change = Callable[[Weights], tuple[Weights, Weights]]
Make = Callable[[Path, Weights], tuple[Written, Weights]]


def joint(name: str, change: Change) -> Make:
    """A joint file in the upstream layout."""
    def make(folder: Path, weights: Weights) -> tuple[Written, Weights]:
        stored, meant = change(weights)
        return (write(folder / name, stored),), meant
    return make


def lossless(dtype: torch.dtype) -> Change:
    return lambda weights: (cast(weights, dtype), weights)


def split(names: tuple[str, str], change: Change, audio_prefix: str,
          start: str = "video", beside: bool = True) -> Make:
    """A video and an audio file; `start` is the one chosen, the other lies beside it or is given as second file."""
    def make(folder: Path, weights: Weights) -> tuple[Written, Weights]:
        video, meant_video = change(video_half(weights))
        audio, meant_audio = change(audio_half(weights, audio_prefix))
        files = [write(folder / names[0], video),
                 write((folder if beside else folder / "elsewhere") / names[1], audio)]
        meant = {f"video_model.{name}": t for name, t in meant_video.items()}
        meant |= {f"audio_model.{name.removeprefix(audio_prefix)}": t for name, t in meant_audio.items()}
        if start == "audio":
            files.reverse()
        return tuple(files[:1] if beside else files), meant
    return make


def core(name: str, change: Change, prefix: str = "") -> Make:
    """A joint file under core's names, below a wrapper."""
    def make(folder: Path, weights: Weights) -> tuple[Written, Weights]:
        stored, meant = change(weights)
        return (write(folder / name, {f"{prefix}{key}": t for key, t in core_layout(stored).items()}),), meant
    return make


def core_metadata(name: str, prefix: str = "") -> Make:
    """Core's quantisation records in the file's metadata, under the file's own names."""
    def make(folder: Path, weights: Weights) -> tuple[Written, Weights]:
        stored, meant, layers = scaled(weights, "weight_scale")
        names = core_layout({layer: None for layer in layers})
        conf = {"layers": {f"{prefix}{layer}": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
                           for layer in names}}
        tensors = {f"{prefix}{key}": t for key, t in core_layout(stored).items()}
        return (write(folder / name, tensors, {"_quantization_metadata": json.dumps(conf)}),), meant
    return make


def wrong(weights: Weights) -> Weights:
    """Weights that must not be the ones taken."""
    return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}


def pickle_of(name: str, wrap: Callable[[Weights], object]) -> Make:
    """A `.pt` or `.pth` file whose bf16 weights lie in dictionaries, or under prefixed names."""
    def make(folder: Path, weights: Weights) -> tuple[Written, Weights]:
        torch.save(wrap(cast(weights, BF16)), folder / name)
        return (str(folder / name),), weights
    return make


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def compiled(weights: Weights) -> Weights:
    """Names as after torch.compile of the model, of each block, and FSDP."""
    return {"_orig_mod." + re.sub(r"(blocks\.\d+)", r"\1._orig_mod", name).replace(
        "ffn.", "_fsdp_wrapped_module.ffn."): tensor for name, tensor in weights.items()}


# --- the table --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    make: Make
    layout: str
    precision: str
    variant: str | None = "720x720_5s"
    bound: float = 0.0  # relative L2 against the unquantised model; 0: equal


KIJAI = ("Wan_2_2_Ovi_video_model_bf16.safetensors", "Wan_2_2_Ovi_audio_model_bf16.safetensors")
KIJAI_FP8 = ("Wan2_2_Ovi_Video_fp8_e4m3fn_scaled_KJ.safetensors", "Wan2_2_Ovi_Audio_fp8_e4m3fn_scaled_KJ.safetensors")
KIJAI_JOINT = "Wan2_2-5B-Ovi_960x960_10s_fp8_e4m3fn_scaled_KJ.safetensors"
WANGP = ("wan2.2_ovi_video_10B_bf16.safetensors", "wan2.2_ovi_audio_10B_bf16.safetensors")
WANGP_INT8 = tuple(name.replace("bf16", "quanto_bf16_int8") for name in WANGP)
MARKERS = {"0-d": torch.zeros(()), "empty": torch.zeros(0), "2-element": torch.zeros(2)}
FP8_BOUND, CAST_BOUND, E5M2_BOUND, INT8_BOUND = 0.08, 0.12, 0.2, 0.03

ROWS: dict[str, Row] = {
    "upstream-bf16": Row(joint("model.safetensors", lossless(BF16)), "upstream", "bfloat16"),
    "upstream-fp16": Row(joint("model_960x960.safetensors", lossless(FP16)), "upstream", "float16", "960x960_5s", 1e-4),
    "upstream-fp32": Row(joint("dreamid_omni.safetensors", lossless(FP32)), "upstream", "float32", None),
    "upstream-fp8-e4m3fn": Row(joint("model_fp8_e4m3fn.safetensors", plain_fp8), "upstream", "float8_e4m3fn",
                               bound=CAST_BOUND),
    "upstream-fp8-e5m2": Row(joint("ovi_720_e5m2.safetensors", lambda w: plain_fp8(w, torch.float8_e5m2)), "upstream",
                             "float8_e5m2", bound=E5M2_BOUND),
    "kijai-split-found": Row(split(KIJAI, lossless(BF16), "audio_model."), "split", "bfloat16"),
    "kijai-split-from-audio": Row(split(KIJAI, lossless(BF16), "audio_model.", "audio"), "split", "bfloat16"),
    "kijai-split-second-file": Row(split(KIJAI, lossless(BF16), "audio_model.", beside=False), "split", "bfloat16"),
    "kijai-split-second-from-audio": Row(split(KIJAI, lossless(BF16), "audio_model.", "audio", beside=False), "split",
                                         "bfloat16"),
    **{f"kijai-split-fp8-scaled-{kind}-marker": Row(
        split(KIJAI_FP8, lambda w, m=marker: kijai_fp8(w, m), "audio_model."), "split", "float8_e4m3fn",
        bound=FP8_BOUND) for kind, marker in MARKERS.items()},
    **{f"kijai-joint-fp8-scaled-{kind}-marker": Row(
        joint(KIJAI_JOINT, lambda w, m=marker: kijai_fp8(w, m)), "upstream", "float8_e4m3fn", "960x960_10s",
        FP8_BOUND) for kind, marker in MARKERS.items()},
    "wangp-split-bf16": Row(split(WANGP, lossless(BF16), ""), "split", "bfloat16"),
    "wangp-split-quanto-int8": Row(split(WANGP_INT8, quanto, ""), "split", "int8", bound=INT8_BOUND),
    "wangp-split-quanto-int8-second-file": Row(split(WANGP_INT8, quanto, "", "audio", beside=False), "split", "int8",
                                               bound=INT8_BOUND),
    "core-bf16": Row(core("ovi_960x960.safetensors", lossless(BF16)), "core", "bfloat16", "960x960_5s"),
    "core-comfy-quant": Row(core("ovi_960_fp8.safetensors", comfy_quant), "core", "float8_e4m3fn", "960x960_5s",
                            FP8_BOUND),
    "core-quantization-metadata": Row(core_metadata("ovi_960_fp8.safetensors"), "core", "float8_e4m3fn", "960x960_5s",
                                      FP8_BOUND),
    "core-quantization-metadata-wrapped": Row(core_metadata("ovi_960_fp8.safetensors", "model.diffusion_model."),
                                              "core", "float8_e4m3fn", "960x960_5s", FP8_BOUND),
    **{f"core-in-{prefix}": Row(core("ovi.safetensors", lossless(BF16), f"{prefix}."), "core", "bfloat16", None)
       for prefix in ("model.diffusion_model", "diffusion_model", "module")},
    "pt-plain": Row(pickle_of("ovi.pt", dict), "upstream", "bfloat16", None),
    "pth-module-names": Row(pickle_of("ovi.pth", lambda w: prefixed(w, "module.")), "upstream", "bfloat16", None),
    "pt-module": Row(pickle_of("ovi.pt", lambda w: {"module": w}), "upstream", "bfloat16", None),
    "pt-app-model": Row(pickle_of("ovi.pt", lambda w: {"app": {"model": w, "step": 7}}), "upstream", "bfloat16", None),
    "pt-state-dict": Row(pickle_of("ovi.pt", lambda w: {"state_dict": w, "epoch": 3}), "upstream", "bfloat16", None),
    "pt-ema": Row(pickle_of("model_ema.pt", lambda w: {"ema": w}), "upstream", "bfloat16", None),
    "pt-ema-before-model": Row(pickle_of("model_ema.pt", lambda w: {"model_ema": w, "state_dict": wrong(w)}),
                               "upstream", "bfloat16", None),
    "pt-ema-below": Row(pickle_of("model_ema.pt", lambda w: {
        "generator": wrong(w), "critic": wrong(w), "generator_ema": {"module": w, "decay": torch.tensor(0.99)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}), "upstream", "bfloat16", None),
    "pt-parameters": Row(pickle_of("ovi.pt", lambda w: {"generator": {
        name: torch.nn.Parameter(tensor) for name, tensor in w.items()}}), "upstream", "bfloat16", None),
    "pt-compiled": Row(pickle_of("ovi.pt", compiled), "upstream", "bfloat16", None),
    "pt-fsdp-of-compiled": Row(pickle_of("ovi.pt", lambda w: {"model_ema": prefixed(compiled(w), "module.")}),
                               "upstream", "bfloat16", None),
}


@cache
def original() -> Weights:
    return draw_weights(SIZES)


def rounds_activations(row: str) -> bool:
    """Whether core multiplies in fp8: these markers allow it, on GPUs that can. All else computes what is stored."""
    return row.endswith(("empty-marker", "0-d-marker")) and comfy.model_management.supports_fp8_compute()
