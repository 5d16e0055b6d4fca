"""The video VAE as ComfyUI's core runs it: encoding, decoding, and the latent statistics the model uses."""

import json
from collections.abc import Iterator
from pathlib import Path

import comfy.latent_formats
import torch
from comfy.ldm.wan.vae2_2 import WanVAE
from golden import rebuild_weights, relative_l2
from safetensors.torch import load_file

from . import EXACT, FP32, Item

STATISTICS = ("latent_mean", "latent_std_reciprocal")


def items(golden: Path) -> Iterator[Item]:
    folder = golden / "wan_vae"
    files = sorted(folder.glob("golden_*.safetensors"))
    if not files:
        yield Item("wan_vae", float("inf"), FP32, f"no golden_*.safetensors in {folder}")
    for file in files:
        tag = file.stem.removeprefix("golden_")
        yield from model_items(f"wan_vae {tag}", folder / f"{tag}_manifest.json", load_file(file))


@torch.no_grad()
def model_items(label: str, manifest: Path, truth: dict) -> Iterator[Item]:
    """Every encoding, decoding and statistic stored for one size of the model."""
    latents = comfy.latent_formats.Wan22()
    yield from statistics_items(label, latents, truth)
    config = json.loads(manifest.read_text())["config"]
    with torch.device("meta"):
        vae = WanVAE(**config).eval()
    weights = rebuild_weights(manifest)
    missing, unexpected = vae.load_state_dict(weights, strict=False, assign=True)
    wrong = [*missing, *unexpected]
    yield Item(f"{label} weights loaded", float(len(wrong)), EXACT, f"missing or unexpected: {wrong[:3]}")
    del weights

    known = {name for name in truth if name.startswith(STATISTICS)}
    for case in sorted({name.rpartition(".")[0] for name in truth if "." in name}):
        video, latent = f"{case}.video", f"{case}.latent"
        if case.startswith("encode.") and {video, latent} <= truth.keys():
            found = latents.process_in(vae.encode(truth[video].float()))
            known |= {video, latent}
            yield Item(f"{label} {latent}", relative_l2(found, truth[latent]), FP32)
        elif case.startswith("decode.") and {latent, f"{video}_unclamped"} <= truth.keys():
            found = vae.decode(latents.process_out(truth[latent].float()))
            known |= {latent, f"{video}_unclamped"}
            yield Item(f"{label} {video}_unclamped", relative_l2(found, truth[f"{video}_unclamped"]), FP32)
    for name in sorted(set(truth) - known):
        yield Item(f"{label} {name}", float("inf"), FP32, "this parity check does not know the tensor")


def statistics_items(label: str, latents: comfy.latent_formats.Wan22, truth: dict) -> Iterator[Item]:
    """The per-channel mean and standard deviation that normalise latents."""
    found = {"latent_mean": latents.latents_mean.flatten(),
             "latent_std_reciprocal": latents.scale_factor / latents.latents_std.flatten()}
    for name in STATISTICS:
        error = relative_l2(found[name], truth[name]) if name in truth else float("inf")
        yield Item(f"{label} {name}", error, FP32)
