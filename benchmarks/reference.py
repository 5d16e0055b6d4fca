"""Load the reference's transformer from a checkout, for running it beside ours in one process.

Nothing of it is copied: its two source files are read from the folder the user names and executed as they are, but
for what a machine without CUDA or flash-attn cannot run: the attention call becomes PyTorch's own, and with float32 the
hard-coded bf16 casts become float32 ones. Needs the package diffusers (not part of the pack's requirements).
"""

import importlib
import re
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F


def sdpa_attention(q, k, v, k_lens=None, **_):
    """The reference's attention call [B, N, H, C] on PyTorch's kernel; full-length keys only."""
    if k_lens is not None and int(k_lens.min()) != k.shape[1]:
        raise ValueError("The benchmark passes full-length sequences only.")
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def load_fusion_class(folder: Path, dtype: torch.dtype, replace_attention: bool):
    """Return the reference's `FusionModel` class from a checkout. Raises FileNotFoundError if it is not one."""
    modules = folder / "ovi" / "modules"
    if not (modules / "fusion.py").is_file():
        raise FileNotFoundError(f"{folder} is no checkout of character-ai/Ovi: {modules / 'fusion.py'} is not there.")
    for name, path in (("ovi", folder / "ovi"), ("ovi.modules", modules)):  # skip the packages' own imports
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
    attention = importlib.import_module("ovi.modules.attention")
    if replace_attention:
        attention.flash_attention = sdpa_attention
    for name in ("model", "fusion"):
        source = (modules / f"{name}.py").read_text(encoding="utf-8")
        if dtype == torch.float32:
            source = source.replace("torch.bfloat16", "torch.float32")
            source = re.sub(r"\.bfloat16\(\)", ".float()", source)
        module = types.ModuleType(f"ovi.modules.{name}")
        module.__package__ = "ovi.modules"
        sys.modules[module.__name__] = module
        exec(compile(source, str(modules / f"{name}.py"), "exec"), module.__dict__)  # noqa: S102 (the user's checkout)
    return sys.modules["ovi.modules.fusion"].FusionModel


def make_reference(folder: Path, sizes: dict, dtype: torch.dtype, device, replace_attention: bool):
    """Build the reference's model at `sizes` (dim, num_heads, num_layers, ffn_dim, text_dim)."""
    shared = {**sizes, "freq_dim": 256, "text_len": 512, "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6}
    fusion = load_fusion_class(folder, dtype, replace_attention)
    model = fusion({**shared, "model_type": "ti2v", "patch_size": [1, 2, 2], "in_dim": 48, "out_dim": 48},
                   {**shared, "model_type": "t2a", "patch_size": [1], "in_dim": 20, "out_dim": 20,
                    "temporal_rope_scaling_factor": 0.19676})
    model.set_rope_params()
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
