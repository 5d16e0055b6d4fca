"""Error per precision: `python benchmarks/precision.py GOLDEN_DIR [--json FILE]`.

Three tables, all on random weights. What a format does to trained weights, which have outliers that random ones lack,
only trained files can tell.

1. The golden models (2 and 3 blocks, all of them quantised): relative L2 of the velocities against the reference in
   float32, over every joint case. "products in bf16" is what a GPU without the format's instructions computes (and
   every format on the CPU, but for int8), "products in the format" what one with them does, emulated where the CPU
   has none: there core rounds the activations as well.
2. The same random model 30 blocks deep: what keeping some blocks in bf16 changes.
3. Rounding error of one 3072 x 3072 matrix with the spread real ones start from: the golden models are too narrow to
   show what unscaled fp8 loses there.

Needs ComfyUI importable (COMFYUI_PATH, or the one `tools/dev.py setup` fetched).
"""

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from devlib.pack import import_pack  # noqa: E402

import_pack()

import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import measure  # noqa: E402
import torch  # noqa: E402
from comfy.quant_ops import QUANT_ALGOS  # noqa: E402
from golden import rebuild_weights, relative_l2, run_case  # noqa: E402
from ovi_native.ovi_model.files import quant_records, quantise  # noqa: E402
from ovi_native.ovi_model.files.quant_records import FULL_PRECISION  # noqa: E402
from ovi_native.ovi_model.files.quantise import Format  # noqa: E402
from ovi_native.ovi_model.ovi import layouts  # noqa: E402
from ovi_native.ovi_model.ovi.quant_recipe import BLOCK_MATRICES, FORMATS, PLAIN_FP8  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny.checkpoint import draw_weights  # noqa: E402
from tiny.inputs import noise, text  # noqa: E402
from tiny.sizes import Sizes, core_layout  # noqa: E402

CONVROT = {"convrot": True, "convrot_groupsize": 64}
CANDIDATES = {
    "fp8_e4m3fn (recipe, no scales)": PLAIN_FP8,
    **FORMATS,
    "(e5m2, scaled)": Format("", "float8_e5m2", "", largest=57344.0),
    "(int8, full products)": Format("", "int8_tensorwise", "", options={"per_channel": True}, conf=FULL_PRECISION),
    "(int8, full products, one scale a matrix)": Format("", "int8_tensorwise", "", largest=127.0, conf=FULL_PRECISION),
    "(int8, rotated)": Format("", "int8_tensorwise", "", options={"per_channel": True, **CONVROT}, conf=CONVROT),
    "(w4a4, rotated)": Format("", "convrot_w4a4", "", options={"convrot_groupsize": 64},
                              conf={"convrot_groupsize": 64}),
}
"""The formats offered and, in brackets, those measured and left out."""


def cast_all(weights: dict, dtype: torch.dtype, skip: tuple[str, ...] = ()) -> dict:
    """Every tensor cast to fp8 and back, but for names with a part in `skip`: what plain casting of a file does."""
    return {key: tensor if any(part in key for part in skip) else tensor.to(dtype).to(torch.bfloat16)
            for key, tensor in weights.items()}


def load(tensors: dict, native: bool, dtype: torch.dtype = torch.bfloat16):
    """The network in `dtype`; native: also multiply in the format where this device has no such instructions."""
    options = {"custom_operations": comfy.ops.mixed_precision_ops({}, dtype, disabled=set())} if native else {}
    if not any(key.endswith(".comfy_quant") for key in tensors):
        options = {"dtype": dtype}
    patcher = comfy.sd.load_diffusion_model_state_dict(dict(tensors), model_options=options)
    patcher.model.manual_cast_dtype = None
    return patcher.model.diffusion_model


def rms(values: list[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5


class Golden:
    """One golden model with its joint cases."""

    def __init__(self, folder: Path):
        stored = folder / "weights.safetensors"
        weights = load_file(stored) if stored.exists() else rebuild_weights(folder / "weight_recipe.json")
        core, _ = layouts.read_towers(weights, {}, folder.name)
        self.weights = {key: tensor.to(torch.bfloat16) for key, tensor in core.items()}
        self.inputs = load_file(folder / "inputs.safetensors")
        self.truth = load_file(folder / "outputs_fp32.safetensors")
        cases = json.loads((folder / "config.json").read_text())["cases"]
        self.cases = {name: case for name, case in cases.items() if not case.get("only")}

    def errors(self, tensors: dict, native: bool = False, dtype: torch.dtype = torch.bfloat16) -> list[float]:
        """[video, audio] error over the cases."""
        model = load(tensors, native, dtype)
        found = [run_case(model, self.inputs, case, dtype) for case in self.cases.values()]
        return [rms([relative_l2(out[at], self.truth[f"{name}.{stream}"])
                     for name, out in zip(self.cases, found, strict=True)])
                for at, stream in enumerate(("vid", "audio"))]


def golden_table(golden: Golden) -> dict[str, list[float | None]]:
    """Rows of [video, audio], and [video, audio] with products in the format where that differs."""
    fp32 = {key: tensor.float() for key, tensor in golden.weights.items()}
    rows = {
        "fp32": golden.errors(fp32, dtype=torch.float32),
        "bf16": golden.errors(golden.weights),
        "plain e4m3 of everything": golden.errors(cast_all(golden.weights, torch.float8_e4m3fn)),
        "plain e4m3, not norms and biases": golden.errors(
            cast_all(golden.weights, torch.float8_e4m3fn, ("norm", "bias"))),
        "plain e5m2 of everything": golden.errors(cast_all(golden.weights, torch.float8_e5m2)),
    }
    for name, target in CANDIDATES.items():
        tensors = quantise.quantise_tensors(golden.weights, replace(
            target, layers=BLOCK_MATRICES, kept_share=0.0))
        weight_only = QUANT_ALGOS[target.algorithm].get("quantize_input", True) or FULL_PRECISION.items() <= dict(
            target.conf).items()  # whether core can multiply in bf16 from these weights
        rows[name] = golden.errors(quant_records.mark_plain_fp8(tensors)) if weight_only else [None, None]
        if target.recorded and not FULL_PRECISION.items() <= dict(target.conf).items():
            rows[name] += golden.errors(tensors, native=True)
    return rows


def depth_table(blocks: int = 30, seed: int = 0) -> dict[str, list[float]]:
    """[video, audio] error of a deep random model against itself in float32, by the blocks kept in bf16."""
    weights = {key: tensor.to(torch.bfloat16) for key, tensor in core_layout(
        draw_weights(Sizes(blocks=blocks), seed)).items()}
    video, audio, context = noise(1, 48, 2, 4, 4, seed=1), noise(1, 20, 9, seed=2), text(6, 3)

    def run(tensors: dict, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
        with torch.no_grad():
            return load(tensors, False, dtype)([video.to(dtype), audio.to(dtype)], torch.tensor([600.0]),
                                               context.to(dtype), {})

    truth = run({key: tensor.float() for key, tensor in weights.items()}, torch.float32)

    def error(tensors: dict) -> list[float]:
        return [relative_l2(found, wanted) for found, wanted in zip(run(tensors), truth, strict=True)]

    rows = {"bf16": error(weights)}
    for name in ("int8", "fp8_scaled", "nvfp4"):
        for kept in (0, 1, 2, 4):
            target = replace(FORMATS[name], kept_share=kept / blocks)
            rows[f"{name}, first {kept} blocks bf16"] = error(quantise.quantise_tensors(weights, target))
        middle = {key: tensor for key, tensor in weights.items() if f"blocks.{blocks // 2}." in key
                  or f"blocks.{blocks // 2 + 1}." in key}
        rest = {key: tensor for key, tensor in weights.items() if key not in middle}
        rows[f"{name}, 2 middle blocks bf16"] = error(
            quantise.quantise_tensors(rest, replace(FORMATS[name], kept_share=0.0)) | middle)
    return rows


def matrix_table(width: int = 3072) -> dict[str, list[float]]:
    """[error] of one matrix with standard deviation 1 / sqrt(width)."""
    matrix = noise(width, width) / width ** 0.5
    rows = {"bf16": [relative_l2(matrix.to(torch.bfloat16), matrix)],
            "plain e5m2": [relative_l2(matrix.to(torch.float8_e5m2).float(), matrix)]}
    for name, target in CANDIDATES.items():
        layer = "blocks.0.ffn.0"
        stored = quant_records.mark_plain_fp8(quantise.quantise(layer, matrix, target))
        rows[name] = [relative_l2(quantise.dequantise(layer, stored), matrix)]
    return rows


def show(title: str, columns: tuple[str, ...], rows: dict[str, list[float | None]]) -> None:
    """Print one table as Markdown."""
    print(f"\n{title}\n\n| precision | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, values in rows.items():
        cells = ["" if value is None else f"{value:.2e}" for value in values] + ["" for _ in columns[len(values):]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path, help="folder in the golden format")
    parser.add_argument("--json", type=Path, help="also write the tables there")
    args = parser.parse_args()
    if not args.golden.is_dir():
        parser.error(f"{args.golden} is not a folder; give the folder with the reference's numbers.")
    logging.disable(logging.WARNING)
    tables = {}
    for folder in ("fusion", "fusion_recipe"):
        tables[folder] = golden_table(Golden(args.golden / folder))
        show(f"Golden model `{folder}`", ("video, products in bf16", "audio", "video, products in the format", "audio"),
             tables[folder])
    for seed in (0, 1):
        name = f"30 random blocks, seed {seed}"
        tables[name] = depth_table(seed=seed)
        show(name, ("video", "audio"), tables[name])
    tables["3072 x 3072 matrix"] = matrix_table()
    show("3072 x 3072 matrix", ("rounding error",), tables["3072 x 3072 matrix"])
    measure.finish("precision", {"tables": tables}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
