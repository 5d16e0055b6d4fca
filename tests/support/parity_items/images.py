"""First-frame preprocessing, in float32 and in bfloat16 as in production."""

from collections.abc import Iterator
from pathlib import Path

import torch
from golden import relative_l2
from ovi_native.ovi_model.media import images
from ovi_native.ovi_model.ovi.variants import GEOMETRY
from safetensors.torch import load_file

from . import BF16, FP32, Item

DTYPES = {"float32": (torch.float32, FP32), "bfloat16": (torch.bfloat16, BF16)}


def items(golden: Path) -> Iterator[Item]:
    path = golden / "image_preprocess.safetensors"
    if not path.exists():
        yield Item("images", float("inf"), FP32, f"{path} is missing")
        return
    tensors = load_file(path)
    names = sorted(key.removesuffix(".image") for key in tensors if key.endswith(".image"))
    if not names:
        yield Item("images", float("inf"), FP32, f"{path} holds no images")
    for name in names:
        picture = tensors[f"{name}.image"][None].float() / 255.0  # [1, H, W, 3]
        target = GEOMETRY.image_target_hw(picture.shape[1], picture.shape[2], int(tensors[f"{name}.area"]))
        for label, (dtype, tolerance) in DTYPES.items():
            found = images.resize_plain(images.to_frame(picture.to(dtype)), *target)
            error = relative_l2(found, tensors[f"{name}.out_{label}"])
            yield Item(f"images/{name}/{label}", error, tolerance, f"to {found.shape[-1]}x{found.shape[-2]}")
