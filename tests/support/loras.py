"""LoRA files for a tiny model, and what it is with them."""

import re

import comfy.sd
import comfy.utils
import torch
from ovi_native.ovi_model.ovi.lora_keys import GROUPS, apply_lora, read_lora
from tiny.inputs import noise

RANK = 3
EVEN = dict.fromkeys(GROUPS, 1.0)


def matrices(model, pattern: str = "") -> dict[str, torch.Tensor]:
    """The linear layers of a model by core's names, without what stands before them."""
    found = {key.removeprefix("diffusion_model.").removesuffix(".weight"): weight
             for key, weight in model.model.state_dict().items() if key.endswith(".weight") and weight.ndim == 2}
    return {name: weight for name, weight in found.items() if re.search(pattern, name)}


def factors(weight: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Down [RANK, columns] and up [rows, RANK]."""
    rows, columns = weight.shape
    return noise(RANK, columns, seed=seed) / 16, noise(rows, RANK, seed=seed + 1) / 16


def make_lora(model, pattern: str, rename, down=".lora_A.weight", up=".lora_B.weight") -> dict[str, torch.Tensor]:
    out = {}
    for seed, (layer, weight) in enumerate(matrices(model, pattern).items()):
        out[rename(layer) + down], out[rename(layer) + up] = factors(weight, 2 * seed)
    return out


def weights(patcher) -> dict[str, torch.Tensor]:
    """All parameters with the patches on them."""
    patcher = patcher.clone()
    patcher.patch_model(torch.device("cpu"))
    try:
        return {key: comfy.utils.get_attr(patcher.model, key).detach().clone()
                for key, _ in patcher.model.named_parameters()}
    finally:
        patcher.unpatch_model(torch.device("cpu"))


def stock(model, lora, strength=1.0):
    """The same by core's own loader, which knows core's names alone."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def load(model, lora, **strengths):
    found = read_lora(model.model, lora, "x.safetensors")
    return apply_lora(model, found, {**EVEN, **strengths})


def assert_same(found: dict, truth: dict) -> None:
    assert found.keys() == truth.keys()
    different = [key for key in truth if not torch.equal(found[key], truth[key])]
    assert not different, different[:5]


def flat(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")


def ovi(name: str) -> str:
    return name if name.startswith("audio_model.") else f"video_model.{name}"
