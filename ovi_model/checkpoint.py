"""From an Ovi checkpoint on disk to ComfyUI's MODEL.

Everything that knows key layouts lives here. Two are read today: the upstream joint file (`video_model.*` beside
`audio_model.*`, block tables named `modulation.modulation`) and core's own (video tower at the root). Weights may be
bf16, fp16, fp32, fp8 without scales, or anything core quantises itself.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from .files import describe_weights, load_weights
from .model import OviModel
from .seam import OviBaseModel, read_sizes

UPSTREAM_PREFIX = "video_model."
AUDIO_PREFIX = "audio_model."
FP8_DTYPES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
QUANT_SUFFIXES = (".comfy_quant", ".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale")

@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint turned out to be, for the node's display."""

    name: str
    layout: str
    precision: str
    parameters: int
    blocks: int
    width: int

    def __str__(self) -> str:
        return (f"{self.name}: Ovi, {self.layout} layout, {self.precision}, {self.parameters / 1e9:.2f} B parameters, "
                f"2 x {self.blocks} blocks, width {self.width}")


def load_model(path: str, weight_dtype: torch.dtype | None = None):
    """Load an Ovi checkpoint.

    path: `.safetensors`, `.pt` or `.pth` (weights only). weight_dtype: None keeps core's choice for the device.
    Returns (ModelPatcher, CheckpointReport). Raises RuntimeError with a sentence for the user if the file is no
    complete Ovi model.
    """
    patcher, report = _load(path, weight_dtype, disable_dynamic=False)
    return patcher, report


def _load(path: str, weight_dtype: torch.dtype | None, disable_dynamic: bool):
    state_dict, metadata = load_weights(path)
    layout = identify(state_dict, Path(path).name)
    # Core's quantisation records name layers by their names in the file: resolve them before any key is renamed.
    state_dict, metadata = comfy.utils.convert_old_quants(state_dict, "", metadata=metadata)
    metadata = {k: v for k, v in metadata.items() if k != "_quantization_metadata"}
    state_dict = mark_plain_fp8(to_core_layout(state_dict))
    check_complete(state_dict, Path(path).name)
    report = describe(state_dict, Path(path).name, layout)

    options = {} if weight_dtype is None else {"dtype": weight_dtype}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state_dict, model_options=options, metadata=metadata, disable_dynamic=disable_dynamic)
    if patcher is None or not isinstance(patcher.model, OviBaseModel):
        raise RuntimeError(f"{Path(path).name} was not recognised as an Ovi model by ComfyUI; is the pack's entry in "
                           "ComfyUI's model list missing because another pack replaced the list? Restart ComfyUI.")
    patcher.cached_patcher_init = (reload_patcher, (path, weight_dtype))
    return patcher, report


def reload_patcher(path: str, weight_dtype: torch.dtype | None, disable_dynamic: bool = False):
    """Load the same file again, for core's multi-GPU clones and its non-dynamic delegates."""
    return _load(path, weight_dtype, disable_dynamic)[0]


def identify(state_dict: dict, name: str) -> str:
    """Return "upstream" or "core"; raise RuntimeError naming what the file is instead."""
    has_audio = f"{AUDIO_PREFIX}patch_embedding.0.weight" in state_dict
    if has_audio and f"{UPSTREAM_PREFIX}patch_embedding.weight" in state_dict:
        return "upstream"
    if has_audio and "patch_embedding.weight" in state_dict:
        return "core"
    if has_audio:
        found = "only Ovi's audio tower"
    elif any("k_fusion" in key for key in state_dict):
        found = "only Ovi's video tower"
    elif "head.modulation" in state_dict:
        found = f"{describe_weights(state_dict)}, without Ovi's audio tower"
    else:
        found = describe_weights(state_dict)
    raise RuntimeError(f"{name} is not a joint Ovi checkpoint: it holds {found}. Choose one with both towers, such as "
                       "model_960x960.safetensors from chetwinlow1/Ovi on Hugging Face (models/diffusion_models).")


def to_core_layout(state_dict: dict) -> dict:
    """Rename upstream keys to core's: the video tower moves to the root, block tables lose a level."""
    return {key.removeprefix(UPSTREAM_PREFIX).replace(".modulation.modulation", ".modulation"): value
            for key, value in state_dict.items()}


def mark_plain_fp8(state_dict: dict) -> dict:
    """Give fp8 weights without scales core's quantisation record, scale 1 and full-precision products.

    Core would otherwise cast norms, biases and modulation to fp8 with them, which doubles the error. fp8 tensors that
    no linear layer multiplies with (convolutions, tables) become bf16.
    """
    out = dict(state_dict)
    for key, tensor in state_dict.items():
        if tensor.dtype not in FP8_DTYPES or f"{key.removesuffix('weight')}comfy_quant" in state_dict:
            continue
        if key.endswith(".weight") and tensor.ndim == 2:
            layer = key.removesuffix(".weight")
            record = {"format": FP8_DTYPES[tensor.dtype], "full_precision_matrix_mult": True}
            out[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
            out[f"{layer}.weight_scale"] = torch.tensor(1.0)
        else:
            out[key] = tensor.to(torch.bfloat16)
    return out


def check_complete(state_dict: dict, name: str) -> None:
    """Raise RuntimeError unless the core-layout state dict fills every parameter of the model it describes."""
    try:
        if "head.modulation" not in state_dict:  # without it core does not take the file for a Wan model at all
            raise KeyError("head.modulation")
        config = comfy.model_detection.detect_unet_config(state_dict, "")
        sizes = read_sizes(state_dict)
    except KeyError as e:
        raise RuntimeError(f"{name} is incomplete: it lacks the tensor {e}. Download it again.") from e
    except (ValueError, IndexError) as e:
        raise RuntimeError(f"{name} is damaged: a tensor that tells the model's size has the wrong number of "
                           f"dimensions ({e}). Download it again.") from e
    if config.get("model_type") != "t2v":
        raise RuntimeError(f"{name} is no Ovi model this pack knows: it has extra tensors of Wan's "
                           f"'{config.get('model_type')}' models. Choose an unmodified Ovi checkpoint.")
    layers = config["num_layers"], sizes["audio_config"]["num_layers"]
    if layers[0] != layers[1]:
        raise RuntimeError(f"{name} is incomplete: its video tower has {layers[0]} blocks, its audio tower "
                           f"{layers[1]}. Download it again.")
    model = OviModel(**config | sizes, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
    expected = {key: tuple(p.shape) for key, p in model.named_parameters()}

    missing = [key for key in expected if key not in state_dict]
    quantised = {key.rpartition(".")[0] for key in state_dict if key.endswith(".comfy_quant")}
    wrong = [f"{key} {tuple(state_dict[key].shape)} instead of {shape}" for key, shape in expected.items()
             if key in state_dict and key.rpartition(".")[0] not in quantised and tuple(state_dict[key].shape) != shape]
    for problem, keys in (("lacks", missing), ("has the wrong shape for", wrong)):
        if keys:
            raise RuntimeError(f"{name} is damaged or incomplete: it {problem} {len(keys)} of {len(expected)} tensors "
                               f"({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}). Download it again.")


def describe(state_dict: dict, name: str, layout: str) -> CheckpointReport:
    """Summarise a core-layout state dict."""
    weights = {k: v for k, v in state_dict.items() if not k.endswith(QUANT_SUFFIXES)}
    sizes = Counter()
    for tensor in weights.values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nelement()
    formats = {json.loads(bytes(v.tolist()))["format"] for k, v in state_dict.items() if k.endswith(".comfy_quant")}
    precision = " + ".join(sorted(formats)) + " quantised" if formats else sizes.most_common(1)[0][0]
    audio = read_sizes(state_dict)["audio_config"]
    return CheckpointReport(name, layout, precision, sum(sizes.values()), audio["num_layers"], audio["dim"])


