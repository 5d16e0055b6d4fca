"""The fused model: forward passes, intermediate tensors, rotary tables, timestep table, and the full key list."""

import json
from collections.abc import Iterator
from pathlib import Path

import comfy.model_detection
import comfy.ops
import comfy.sd
import torch
from comfy.ldm.flux.math import apply_rope1
from golden import rebuild_weights, relative_l2, run_case
from ovi_native.ovi_model.ovi import checkpoint, layouts, supported_models
from ovi_native.ovi_model.ovi.blocks import OviBlock
from ovi_native.ovi_model.ovi.model import AUDIO_ROPE_SCALE, OviModel
from ovi_native.ovi_model.ovi.towers import timestep_sinusoids
from safetensors.torch import load_file

from . import BF16, EXACT, FP32, Item

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def items(golden: Path) -> Iterator[Item]:
    for folder in ("fusion", "fusion_recipe"):
        for mode in DTYPES:
            yield from forward_items(golden / folder, mode)
    yield from intermediate_items(golden / "fusion")
    yield from rope_items(golden / "rope.safetensors")
    yield from key_items(golden / "full_keys.json")


def load_fusion(folder: Path, dtype: torch.dtype):
    """Load a golden fusion model through the pack's own conversion; returns (MODEL, inputs, config)."""
    if (folder / "weights.safetensors").exists():
        weights = load_file(folder / "weights.safetensors")
    else:
        weights = rebuild_weights(folder / "weight_recipe.json")
    supported_models.register()
    weights, _ = layouts.read_towers(weights, {}, folder.name)
    checkpoint.check_complete(weights, folder.name)
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
    patcher.model.manual_cast_dtype = None  # measure bf16 itself, also where ComfyUI would compute in float32
    return patcher, load_file(folder / "inputs.safetensors"), json.loads((folder / "config.json").read_text())


def forward_items(folder: Path, mode: str) -> Iterator[Item]:
    patcher, inputs, config = load_fusion(folder, DTYPES[mode])
    truth = load_file(folder / "outputs_fp32.safetensors")
    for name, case in config["cases"].items():
        video, audio = run_case(patcher.model.diffusion_model, inputs, case, DTYPES[mode])
        for stream, out in (("vid", video), ("audio", audio)):
            if out is None and f"{name}.{stream}" not in truth:
                continue
            error = float("inf") if out is None else relative_l2(out, truth[f"{name}.{stream}"])
            yield Item(f"{folder.name} {mode} {name}.{stream}", error, FP32 if mode == "fp32" else BF16)


def intermediate_items(folder: Path) -> Iterator[Item]:
    """Every stored intermediate tensor, taken from the running model by forward hooks."""
    patcher, inputs, config = load_fusion(folder, torch.float32)
    truth = load_file(folder / "intermediates_fp32.safetensors")
    model = patcher.model.diffusion_model
    found: dict[str, torch.Tensor] = {}
    seen = record_intermediates(model, found)
    for case in sorted({name.split(".")[0] for name in truth}):
        found.clear()
        run_case(model, inputs, config["cases"][case], torch.float32)
        for name in sorted(n for n in truth if n.startswith(f"{case}.")):
            value = pick(found, name.removeprefix(f"{case}."), truth[name])
            error = float("inf") if value is None else relative_l2(value, truth[name])
            yield Item(f"{folder.name} fp32 {name}", error, FP32)
    for handle in seen:
        handle.remove()


def record_intermediates(model: OviModel, found: dict) -> list:
    """Store outputs of the model's parts in `found` under the goldens' names; returns the hooks.

    Copies: the blocks go on to use the memory of what their parts return.
    """
    handles = []

    def keep(module, name, change=torch.clone):
        handles.append(module.register_forward_hook(lambda _m, _a, out: found.__setitem__(name, change(out))))

    for stream, tower in (("vid", model), ("audio", model.audio_model)):
        keep(tower.patch_embedding, f"{stream}.tokens", lambda out: out.flatten(2).transpose(1, 2))
        keep(tower.text_embedding, f"{stream}.text_emb")
        keep(tower.time_embedding, f"{stream}.time_emb")
        keep(tower.time_projection, f"{stream}.time_proj", lambda out, d=tower.dim: out.unflatten(-1, (6, d)))
        keep(tower.head, f"{stream}.head_out")
        keep(tower.blocks[0].self_attn.o, f"block0.{stream}.self_attn_out")
        keep(tower.blocks[0].cross_attn.o, f"block0.{stream}.cross_out")
        keep(tower.blocks[0].ffn, f"block0.{stream}.ffn_out")
    for i, block in enumerate(model.blocks):
        if isinstance(block, OviBlock):
            keep(block, f"block{i}", lambda out: {"vid": out[0].x, "audio": out[1].x})
    return handles


def pick(found: dict, name: str, truth: torch.Tensor):
    """Find a recorded tensor under a golden's name, cut to the rows the golden keeps."""
    if name in found:
        value = found[name]
    elif name.endswith(("_first_frame", "_rest")):
        base = name.removesuffix("_first_frame").removesuffix("_rest")
        value = found[base][:, :1] if name.endswith("_first_frame") else found[base][:, 1:2]
    else:
        block, _, stream = name.partition(".")
        value = found.get(block, {}).get(stream)
    if value is None:
        return None
    return value[:, :truth.shape[1]]


def rope_items(file: Path) -> Iterator[Item]:
    """Rotary tables and the sinusoidal timestep table of the real head size."""
    data = load_file(file)
    model = OviModel(
        audio_config={"dim": 256, "in_dim": 20, "out_dim": 20, "num_heads": 2, "conv_hidden_dim": 8, "ffn_dim": 8,
                      "text_dim": 8, "num_layers": 0},
        dim=256, in_dim=48, out_dim=48, num_heads=2, ffn_dim=8, text_dim=8, num_layers=0, patch_size=(1, 2, 2),
        device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    last = int(data["positions"].max()) + 1
    rows = data["positions"]
    audio = model.audio_model.rope_table(last, 0.0, AUDIO_ROPE_SCALE, "cpu")[0, :, 0][rows]
    pairs = data["audio.cos"].shape[1]
    yield Item("rope audio.cos", relative_l2(audio[:, :pairs, 0, 0], data["audio.cos"]), FP32)
    yield Item("rope audio.sin", relative_l2(audio[:, :pairs, 1, 0], data["audio.sin"]), FP32)
    yield radians_item("audio", model.audio_model.rope_table(2, 0.0, AUDIO_ROPE_SCALE, "cpu")[0, 1, 0, :pairs], data)
    start = 0
    for axis, name in enumerate(("video_t", "video_h", "video_w")):
        pairs = data[f"{name}.cos"].shape[1]
        size = [1, 1, 1]
        size[axis] = last
        table = model.rope_encode(size[0], 2 * size[1], 2 * size[2], device="cpu", dtype=torch.float32)[0, :, 0]
        at_one, table = table[1, start:start + pairs], table[rows, start:start + pairs]
        start += pairs
        yield radians_item(name, at_one, data)
        yield Item(f"rope {name}.cos", relative_l2(table[..., 0, 0], data[f"{name}.cos"]), FP32)
        yield Item(f"rope {name}.sin", relative_l2(table[..., 1, 0], data[f"{name}.sin"]), FP32)
    t, h, w = data["apply_video.grid"].tolist()
    table = model.rope_encode(t, 2 * h, 2 * w, device="cpu", dtype=torch.float32)
    rotated = apply_rope1(data["apply_video.in"], table)
    yield Item("rope apply_video", relative_l2(rotated, data["apply_video.out"]), FP32)
    table = model.audio_model.rope_table(data["apply_audio.in"].shape[1], 0.0, AUDIO_ROPE_SCALE, "cpu")
    rotated = apply_rope1(data["apply_audio.in"], table)
    yield Item("rope apply_audio", relative_l2(rotated, data["apply_audio.out"]), FP32)
    sinusoids = timestep_sinusoids(data["timestep_embedding.t"], data["timestep_embedding.out"].shape[-1])
    yield Item("rope timestep_embedding", relative_l2(sinusoids, data["timestep_embedding.out"]), FP32)


def radians_item(name: str, matrices: torch.Tensor, data: dict) -> Item:
    """Angles at position 1, read back from rotary matrices [pairs, 2, 2]."""
    angles = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])
    return Item(f"rope {name}.radians_per_position", relative_l2(angles, data[f"{name}.radians_per_position"]), FP32)


def key_items(file: Path) -> Iterator[Item]:
    """Every tensor of the real model, by name and shape, against the model the loader would build (on meta)."""
    golden = json.loads(file.read_text())
    listed = golden["keys"]
    listed = dict(listed) if isinstance(listed, list) else listed
    tensors = {key: torch.empty(shape, device="meta", dtype=torch.bfloat16) for key, shape in listed.items()}
    converted, layout = layouts.read_towers(tensors, {}, file.name)
    detail = "" if layout == "upstream" else f"taken for {layout}"
    try:
        checkpoint.check_complete(converted, file.name)
    except RuntimeError as error:
        detail = str(error)
    yield Item("full key list", 1.0 if detail else 0.0, EXACT, detail or f"{len(listed)} tensors")

    supported_models.register()
    patcher_config = comfy.model_detection.model_config_from_unet(converted, "")
    recognised = isinstance(patcher_config, supported_models.OviConfig)
    yield Item("full key list detected as Ovi by core", 0.0 if recognised else 1.0, EXACT)
    counts = golden["parameter_counts"]
    total = sum(t.nelement() for t in tensors.values())
    wanted = counts["total"] if isinstance(counts.get("total"), int) else total
    report = checkpoint.describe(converted, file.name, layout, None)
    yield Item("full parameter count", float(report.parameters != wanted), EXACT, f"{report.parameters:,}")
