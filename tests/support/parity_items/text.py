"""The text encoder: Wan-native weights through the pack's conversion into core's UMT5, and the full key list."""

import json
from collections.abc import Iterator
from pathlib import Path

import comfy.text_encoders.t5
import comfy.text_encoders.wan
import torch
from golden import relative_l2
from ovi_native.ovi_model.text import umt5
from safetensors.torch import load_file

from . import BF16, EXACT, FP32, Item

DTYPES = {"fp32": (torch.float32, FP32), "bf16": (torch.bfloat16, BF16)}
MAX_DISTANCE = 128  # of relative positions, the same in the reference and in core


def items(golden: Path) -> Iterator[Item]:
    folder = golden / "t5"
    outputs = load_file(folder / "outputs.safetensors")
    checked: set[str] = set()
    for mode, (dtype, tolerance) in DTYPES.items():
        yield from encoder_items(folder, outputs, mode, dtype, tolerance, checked)
    found = comfy.text_encoders.t5.T5Attention._relative_position_bucket(
        outputs["bucket.relative_position"], num_buckets=umt5.BUCKETS, max_distance=MAX_DISTANCE)
    wrong = (found != outputs["bucket.index"]).float().mean().item()
    yield Item("t5 relative position buckets", wrong, EXACT, f"{found.numel()} positions")
    for name in sorted(set(outputs) - checked - {"bucket.relative_position", "bucket.index"}):
        yield Item(f"t5 {name}", float("inf"), FP32, "this parity check does not know the tensor")
    yield from full_key_items(golden / "t5_full_keys.json")


@torch.no_grad()
def encoder_items(folder: Path, outputs: dict, mode: str, dtype: torch.dtype, tolerance: float,
                  checked: set[str]) -> Iterator[Item]:
    """Embeddings and block outputs of one mode; notes in `checked` which tensors of the golden it compared."""
    inputs = load_file(folder / "inputs.safetensors")
    weights = umt5.to_core_layout(load_file(folder / "weights.safetensors"))
    config = umt5.derive_config(weights)
    if mode == "fp32":
        yield Item("t5 sizes read from the weights", *sizes_error(
            config, json.loads((folder / "config.json").read_text())["config"]))
    model = comfy.text_encoders.wan.te(dtype_t5=dtype)(model_options={"umt5xxl_model_config": config})
    missing, unexpected = model.load_sd({name: value.to(dtype) for name, value in weights.items()})
    wrong = [*missing, *unexpected]
    yield Item(f"t5 {mode} weights loaded", float(len(wrong)), EXACT, f"{wrong}"[:200])
    encoder = model.umt5xxl.transformer

    def run(row: int, block: int | None) -> tuple:
        """Final and intermediate states [true length, D] of one row, encoded at the padded length."""
        ids, mask = inputs["ids"][row:row + 1], inputs["mask"][row:row + 1]
        states = encoder(ids, mask, dtype=torch.float32, intermediate_output=block, final_layer_norm_intermediate=False)
        length = int(mask.sum())
        return tuple(None if state is None else state[0, :length] for state in states)

    for name in sorted(name for name in outputs if name.startswith(f"{mode}.")):
        what = name.removeprefix(f"{mode}.")
        if what.startswith("embedding"):
            found = run(int(what.removeprefix("embedding")), None)[0]
        else:
            block, _, row = what.removeprefix("block").partition(".row")
            found = run(int(row), int(block))[1]
        checked.add(name)
        yield Item(f"t5 {name}", relative_l2(found, outputs[name]), tolerance)


def sizes_error(config: dict, reference: dict) -> tuple[float, float, str]:
    """(number of differing sizes, 0, detail) between core's names and the reference's."""
    pairs = {
        "vocab": config["vocab_size"], "dim": config["d_model"], "dim_attn": config["d_kv"] * config["num_heads"],
        "dim_ffn": config["d_ff"], "num_heads": config["num_heads"], "num_layers": config["num_layers"],
        "num_buckets": umt5.BUCKETS, "shared_pos": False,
    }
    wrong = {name: (value, reference[name]) for name, value in pairs.items() if reference[name] != value}
    return float(len(wrong)), EXACT, f"found, expected: {wrong}" if wrong else "all equal"


def full_key_items(file: Path) -> Iterator[Item]:
    """Every tensor of the real encoder, renamed, against core's own UMT5-XXL (both without memory)."""
    golden = json.loads(file.read_text())
    weights = umt5.to_core_layout(
        {name: torch.empty(shape, device="meta") for name, shape in golden["keys"].items()})
    config = umt5.derive_config(weights)
    yield Item("t5 full sizes", *sizes_error(config, golden["config"]))

    core = comfy.text_encoders.wan.te()(device="meta", dtype=torch.float32).umt5xxl.transformer
    expected = {name: tuple(value.shape) for name, value in core.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    detail = f"differing: {wrong[:3]}" if wrong else f"{len(found)} keys"
    yield Item("t5 full key list", float(len(wrong)), EXACT, detail)
    count = sum(value.numel() for value in weights.values())
    yield Item("t5 full parameter count", float(count != golden["num_parameters"]), EXACT, f"{count:,}")
