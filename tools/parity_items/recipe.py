"""Weights of the large golden models, rebuilt from their recipe (the rule is in the goldens' README)."""

import json
import zlib
from pathlib import Path

import torch


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
