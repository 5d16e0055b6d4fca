"""Numbers recorded from the reference: what both `tests/parity` and `benchmarks/precision.py` make of them.

Needs the pack imported as `ovi_native` (`devlib.pack.import_pack`). The folder's README says how it was recorded.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch


def relative_l2(found: torch.Tensor, truth: torch.Tensor) -> float:
    """norm(found - truth) / norm(truth); infinite if the shapes differ."""
    if found.shape != truth.shape:
        return float("inf")
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def rebuild_weights(manifest: Path) -> dict[str, torch.Tensor]:
    """Rebuild all recipe tensors of a manifest as float32 holding bf16 values; constant buffers are left out.

    Raises ValueError if a tensor's checksum does not match, so a wrong generator is never mistaken for a wrong model.
    """
    data = json.loads(Path(manifest).read_text())
    return {name: rebuild_tensor(data["salt"], name, entry)
            for name, entry in dict(data["tensors"]).items() if not entry.get("constant")}


def rebuild_tensor(salt: str, name: str, entry: dict) -> torch.Tensor:
    """Draw one tensor of uniform numbers around `c` with half-width `a`, rounded to bf16."""
    generator = torch.Generator().manual_seed(zlib.crc32((salt + name).encode()))
    drawn = torch.rand(entry["shape"], generator=generator, dtype=torch.float32)
    drawn = drawn.mul_(2).sub_(1).mul_(entry["a"]).add_(entry["c"]).to(torch.bfloat16)
    found = zlib.crc32(drawn.contiguous().view(torch.int16).numpy().tobytes())
    if found != entry["crc32"]:
        raise ValueError(f"{name}: rebuilt tensor has checksum {found}, its recipe says {entry['crc32']}.")
    return drawn.float()


@torch.no_grad()
def run_case(model, inputs: dict, case: dict, dtype: torch.dtype):
    """One forward pass as a case of config.json describes it; returns (video [C, T, H, W], audio [A, C]) or None."""
    only = case.get("only")
    video = inputs["vid"][None].to(dtype)
    mask = None
    if case.get("first_frame_is_clean"):
        mask = torch.ones(1, 1, video.shape[2], 1, 1)
        mask[:, :, 0] = 0
    out = model(
        [None if only == "audio" else video, None if only == "video" else inputs["audio"].T[None].to(dtype)],
        inputs[case["t"]].float(), inputs["vid_context"][None].to(dtype), {},
        audio_context=inputs["audio_context"][None].to(dtype), denoise_mask=mask,
        skip_layers=[case["slg_layer"]] if case.get("slg_layer") else None)
    return None if out[0] is None else out[0][0], None if out[1] is None else out[1][0].T
