"""How matrices are quantised, while a model loads and into files. Which ones are is a family's recipe.

The arithmetic is core's: `QuantizedTensor.from_float` of its layouts, so that what is written is what core reads, plus
the `comfy_quant` record by which core knows a quantised layer. All that is not quantised becomes bf16.

Works on one layer at a time, on core's names, and never on a whole model: a caller can stream.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import Tensor

from .quant_records import FULL_PRECISION, QUANT_SUFFIXES, encode_record, read_record
from .reader import StateDict

SLAB = 1024
"""Rows quantised at once: bounds the temporaries. A multiple of 128, the tile in which block scales are laid out."""


@dataclass(frozen=True)
class Format:
    """A way to store a matrix in fewer bits.

    algorithm: core's name for it. largest: what one scale for the whole tensor maps its largest weight to; None if the
    layout finds its own scales. options: of the layout's `quantize`. conf: what core's record says beside the
    algorithm. recorded: False writes bare fp8 without scale or record, as other programs do. layers: names of
    those that are quantised, with a group "block" for the number of theirs; None: every one with a matrix. kept_share:
    the share of the blocks, from the first, that stays bf16. first_block: the first to quantise, see `for_blocks`.
    """

    name: str
    algorithm: str
    summary: str
    largest: float | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    conf: Mapping[str, object] = field(default_factory=dict)
    recorded: bool = True
    layers: re.Pattern[str] | None = None
    kept_share: float = 0.0
    first_block: int = 0

    @property
    def layout(self) -> str:
        """Name of core's layout class."""
        return QUANT_ALGOS[self.algorithm]["comfy_tensor_layout"]

    @property
    def record(self) -> dict:
        """What core's record of a layer in this format says."""
        return {"format": self.algorithm, **self.conf}

    def for_blocks(self, blocks: int) -> "Format":
        """The recipe for towers of that many blocks."""
        return replace(self, first_block=int(blocks * self.kept_share + 1e-9))

    def wants(self, layer: str, weight: Tensor | None) -> bool:
        """Whether the recipe quantises this layer."""
        if weight is None or weight.ndim != 2 or self.layers is None:
            return weight is not None and weight.ndim == 2
        match = self.layers.fullmatch(layer)
        return match is not None and int(match["block"]) >= self.first_block

    def count_blocks(self, layers: Iterable[str]) -> int:
        """Blocks that the recipe's layers belong to, by the highest number."""
        found = (self.layers.fullmatch(layer) for layer in layers) if self.layers else ()
        return 1 + max((int(match["block"]) for match in found if match), default=-1)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp8_scaled", "float8_e4m3fn", "8-bit floats, one scale a matrix", largest=448.0),
        Format("int8", "int8_tensorwise", "8-bit integers, one scale a row", options={"per_channel": True}),
        Format("mxfp8", "mxfp8", "8-bit floats, one scale every 32 weights"),
        Format("nvfp4", "nvfp4", "4-bit floats, one scale every 16 weights", largest=448.0 * 6.0),
    )
}
"""What core reads with its own records."""

PLAIN_FP8 = Format("fp8_e4m3fn", "float8_e4m3fn", "bare 8-bit floats for other programs", recorded=False)


def quantise_tensors(tensors: StateDict, target: Format) -> StateDict:
    """Quantise core-layout tensors while a model loads; bit-identical to what `tools/convert.py` writes.

    Runs on the GPU if ComfyUI computes on one; the result is in ordinary memory. Raises ValueError if core cannot
    compute with the format here.
    """
    check_runs(target, comfy.model_management.get_torch_device())
    device = quantising_device()
    layers = by_layer(tensors)
    target = target.for_blocks(target.count_blocks(layers))
    out: StateDict = {}
    for layer, group in layers.items():
        out.update(convert_layer(layer, group, target, device))
    return out


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, StateDict]:
    """Group core-layout tensors by the module that owns them."""
    layers: dict[str, StateDict] = {}
    for key, tensor in tensors.items():
        layers.setdefault(key.rpartition(".")[0], {})[key] = tensor
    return layers


def convert_layer(layer: str, tensors: StateDict, target: Format | torch.dtype | None,
                  device: torch.device | str = "cpu") -> StateDict:
    """Bring one layer's tensors to a format, or to a plain dtype; None leaves them as they are.

    tensors: everything below `layer.` in core's form. A layer already in the wanted format keeps its bits; one in
    another is computed back to float32 first. Raises RuntimeError if a weight is not finite, or cannot be computed
    back.
    """
    if target is None:
        return tensors
    record = tensors.get(f"{layer}.comfy_quant")
    weight = tensors.get(f"{layer}.weight")
    quantising = isinstance(target, Format) and target.wants(layer, weight)
    if record is not None:
        if quantising and is_stored(read_record(record), tensors.get(f"{layer}.weight_scale"), target):
            if not target.recorded:
                return without_records(cast_bias(layer, tensors))
            kept = {name: value for name, value in read_record(record).items() if name not in FULL_PRECISION}
            return {**cast_bias(layer, tensors), f"{layer}.comfy_quant": encode_record(kept | target.record)}
        weight = dequantise(layer, tensors)
        tensors = {**without_records(tensors), f"{layer}.weight": weight}
    if not quantising:
        return cast(tensors, torch.bfloat16 if isinstance(target, Format) else target)
    others = {key: tensor for key, tensor in tensors.items() if key != f"{layer}.weight"}
    return {**cast(others, torch.bfloat16), **quantise(layer, weight, target, device)}


def quantise(layer: str, weight: Tensor, target: Format, device: torch.device | str = "cpu") -> StateDict:
    """Quantise one matrix [out, in]: the tensors core expects below `layer.`, its record included.

    Works in float32, slab by slab: in bf16 the weights would be rounded a second time on their way.
    """
    largest = max(float(slab.abs().max()) for slab in weight.split(SLAB))
    if not math.isfinite(largest):
        raise RuntimeError(f"{layer}.weight holds values that are not finite: the file is damaged; download it again.")
    options = dict(target.options)
    if target.largest is not None and target.recorded:
        scale = largest / target.largest or 1.0  # a matrix of zeros has no scale of its own
        options["scale"] = torch.tensor(scale, dtype=torch.float32, device=device)
    slabs = [QuantizedTensor.from_float(slab.to(device, torch.float32), target.layout, **options).state_dict("weight")
             for slab in weight.split(SLAB)]
    stored = {leaf: storable(join(parts)).cpu() for leaf, parts in zip(
        slabs[0], zip(*(slab.values() for slab in slabs), strict=True), strict=True)}
    if not target.recorded:
        return {f"{layer}.weight": stored["weight"]}
    stored["comfy_quant"] = encode_record(target.record)
    return {f"{layer}.{leaf}": tensor for leaf, tensor in stored.items()}


def join(parts: tuple[Tensor, ...]) -> Tensor:
    """The tensor whose slabs these are; a scale of the whole matrix is the same in each (see `Format.largest`)."""
    if parts[0].ndim == 0:
        assert all(torch.equal(part, parts[0]) for part in parts), "a format with one scale a matrix needs `largest`"
        return parts[0]
    return torch.cat([as_bytes(part) for part in parts]).view(parts[0].dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes: torch.cat does not know all of them."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor


def storable(tensor: Tensor) -> Tensor:
    """Power-of-two scales as bytes: core's own file reader does not know their dtype, its layers take both."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor


def dequantise(layer: str, tensors: StateDict) -> Tensor:
    """Compute a quantised layer's matrix back in float32, through core's own linear layer.

    Raises RuntimeError if core does not read it, or if its input is to be scaled as well.
    """
    if f"{layer}.pre_quant_scale" in tensors:
        raise RuntimeError(f"{layer} scales its input too, which only its own format can hold: use --dtype keep.")
    algorithm = read_record(tensors[f"{layer}.comfy_quant"]).get("format")
    if algorithm not in QUANT_ALGOS:
        raise RuntimeError(f"{layer} is stored as '{algorithm}', which this ComfyUI does not read "
                           f"(it reads {', '.join(QUANT_ALGOS)}): update ComfyUI.")
    rows, columns = tensors[f"{layer}.weight"].shape
    packed = 2 if QUANT_ALGOS[algorithm]["storage_t"] == torch.uint8 or algorithm == "convrot_w4a4" else 1
    linear = comfy.ops.mixed_precision_ops({}, torch.float32).Linear(columns * packed, rows, bias=False, device="cpu")
    linear.load_state_dict({key.removeprefix(f"{layer}."): tensor for key, tensor in tensors.items()
                            if not key.endswith((".bias", ".input_scale"))})
    return linear.weight.dequantize().float()


def is_stored(record: Mapping, scale: Tensor | None, target: Format) -> bool:
    """Whether the stored bits of a layer with this record are what the target format holds."""
    if not target.recorded and (scale is None or bool((scale != 1).any())):
        return False
    return record.get("format") == target.algorithm and not record.get("convrot")


def without_records(tensors: StateDict) -> StateDict:
    """The weight and bias alone, without scales and record."""
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(QUANT_SUFFIXES)}


def cast(tensors: StateDict, dtype: torch.dtype) -> StateDict:
    """Cast the floating tensors."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def cast_bias(layer: str, tensors: StateDict) -> StateDict:
    """A quantised layer with its bias in bf16, all else as it is."""
    bias = f"{layer}.bias"
    return tensors if bias not in tensors else {**tensors, bias: tensors[bias].to(torch.bfloat16)}


def quantising_device() -> torch.device:
    """Where to quantise: ComfyUI's GPU if it is a CUDA (or ROCm) one, else the CPU."""
    device = comfy.model_management.get_torch_device()
    return device if device.type == "cuda" else torch.device("cpu")


def check_runs(target: Format, device: torch.device) -> None:
    """Raise ValueError, with what to do, if core cannot compute with this format on this device.

    Formats a GPU has no instructions for are no obstacle: core then computes in bf16 from the stored weights.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else None
    reason = obstacle(target, device.type, capability)
    if reason:
        raise ValueError(f"weight_dtype '{target.name}' does not run here: {reason}")


def obstacle(target: Format, device_type: str, capability: tuple[int, int] | None = None) -> str | None:
    """Why a format cannot run on a kind of device (and CUDA capability), and what to choose; None if it can."""
    algorithm = QUANT_ALGOS.get(target.algorithm)
    if algorithm is None:
        return (f"this ComfyUI reads {', '.join(QUANT_ALGOS) or 'no quantised weights'}; install the comfy-kitchen "
                "version its requirements.txt asks for.")
    if device_type == "mps" and algorithm["storage_t"] in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8):
        return "Apple GPUs have no 8-bit floats; choose bf16."
    # Core goes around missing fp8 and fp4 instructions by itself, but always multiplies int8 as int8.
    minimum = getattr(comfy.quant_ops.get_layout_class(target.layout), "MIN_SM_VERSION", None)
    insists = not algorithm.get("quantize_input", True)
    if insists and capability and minimum and capability < minimum:
        return (f"it needs an NVIDIA GPU of compute capability {minimum[0]}.{minimum[1]} or newer, this one has "
                f"{capability[0]}.{capability[1]}; choose fp8_scaled.")
    return None
