"""Every text encoder and audio VAE file in circulation, in its exact layout; the rest of `test_formats.py`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from devlib.common import ROOT
from ovi_native.ovi_model.media import audio_vae
from ovi_native.ovi_model.text.umt5 import load_text_encoder
from support.embeddings import encode
from support.formats import (
    BF16,
    FP8,
    FP16,
    FP32,
    MARKERS,
    ROWS,
    Change,
    Weights,
    Written,
    cast,
    rounds_activations,
    write,
)
from tiny import audio
from tiny.compare import relative_l2
from tiny.inputs import noise
from tiny.text_encoder import text_encoder
from torch import Tensor

# --- text encoders ----------------------------------------------------------------------------------------------------

PROMPT = "A man turns and says <S>Wait here (for me), at 3:30!<E> <AUDCAP>wind, birds<ENDAUDCAP>"
T5_MATRIX = re.compile(r"(SelfAttention\.[qkvo]|wi_0|wi_1|wo|attn\.[qkvo]|gate\.0|fc1|fc2)\.weight$")


@cache
def umt5() -> Weights:
    """A tiny UMT5 in core's layout whose numbers are exact in bf16 and fp16; its tokenizer is inside."""
    return {name: tensor if name == "spiece_model" else tensor.to(BF16).to(FP16)
            for name, tensor in text_encoder(0).items()}


def change(weights: Weights, convert: Callable[[str, Tensor], Tensor]) -> Weights:
    return {name: tensor if name == "spiece_model" else convert(name, tensor) for name, tensor in weights.items()}


def wan_native(weights: Weights) -> Weights:
    """Wan's own names; the tokenizer is no part of such files."""
    names = ((r"encoder\.block\.(\d+)\.", r"blocks.\1."), (r"layer\.0\.SelfAttention\.relative_attention_bias", (
        "pos_embedding.embedding")), (r"layer\.0\.SelfAttention", "attn"), (r"layer\.0\.layer_norm", "norm1"),
        (r"layer\.1\.layer_norm", "norm2"), (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
        (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"), (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
        (r"^shared", "token_embedding"), (r"^encoder\.final_layer_norm", "norm"))
    out = {}
    for name, tensor in weights.items():
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    del out["spiece_model"]
    return out


def scaled_t5(weights: Weights, marker: Tensor) -> tuple[Weights, Weights]:
    """Core's older scaled fp8, as umt5_xxl_fp8_e4m3fn_scaled is stored."""
    stored, meant = {"scaled_fp8": marker.to(FP8)}, dict(weights)
    for name, tensor in weights.items():
        stored[name] = tensor
        if T5_MATRIX.search(name):
            scale = tensor.float().abs().max() / 448
            stored[name] = (tensor.float() / scale).to(FP8)
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            meant[name] = stored[name].float() * scale
    return stored, meant


def plain_fp8_t5(weights: Weights, keep: str) -> tuple[Weights, Weights]:
    """A plain cast of everything but names with one of the words in `keep` (a pattern), which stay bf16."""
    stored = change(weights, lambda name, tensor: tensor.to(BF16 if keep and re.search(keep, name) else FP8))
    return stored, change(stored, lambda _, tensor: tensor.to(FP32))


@dataclass(frozen=True)
class TextRow:
    """What becomes of the weights in core's layout: (file name, (stored, meant) in core's names, whether renamed)."""

    file: str
    change: Change
    native: bool = False
    bound: float = 0.0


def to(dtype: torch.dtype) -> Change:
    return lambda weights: (change(weights, lambda _, tensor: tensor.to(dtype)), weights)


NATIVE_KEPT = r"norm|relative_attention_bias|shared"
TEXT_ROWS = {
    "umt5-core-fp16": TextRow("umt5_xxl_fp16.safetensors", to(FP16)),
    "umt5-core-bf16": TextRow("umt5_xxl_bf16.safetensors", to(BF16)),
    **{f"umt5-core-fp8-scaled-{kind}-marker": TextRow(
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors", lambda w, m=marker: scaled_t5(w, m), bound=0.1)
       for kind, marker in MARKERS.items()},
    "umt5-wan-pth": TextRow("models_t5_umt5-xxl-enc-bf16.pth", to(BF16), native=True),
    "umt5-wan-safetensors-bf16": TextRow("umt5-xxl-enc-bf16.safetensors", to(BF16), native=True),
    "umt5-wan-fp8-e4m3fn": TextRow("umt5-xxl-enc-fp8_e4m3fn.safetensors", lambda w: plain_fp8_t5(w, NATIVE_KEPT),
                                   native=True, bound=0.15),
    "umt5-wan-fp8-e4m3fn-everything": TextRow("umt5-xxl-enc-fp8_e4m3fn.safetensors", lambda w: plain_fp8_t5(w, ""),
                                              native=True, bound=0.25),
}


def embed(path: str) -> Tensor:
    return encode(load_text_encoder(path), PROMPT)[0]


@pytest.mark.usefixtures("either_loading")
@pytest.mark.parametrize("row", TEXT_ROWS)
def test_text_encoder(row, tmp_path):
    case = TEXT_ROWS[row]
    stored, meant = case.change(umt5())
    (tmp_path / "spiece.model").write_bytes(umt5()["spiece_model"].numpy().tobytes())
    found = embed(write(tmp_path / case.file, wan_native(stored | {"spiece_model": umt5()["spiece_model"]})
                        if case.native else stored))
    plain = embed(write(tmp_path / "plain.safetensors", umt5()))
    if not case.bound:
        assert torch.equal(found, plain)
        return
    assert 0 < relative_l2(found, plain) < case.bound
    truth = embed(write(tmp_path / "truth.safetensors", change(meant, lambda _, tensor: tensor.to(FP32))))
    assert relative_l2(found, truth) < (case.bound if rounds_activations(row) else 1e-5)


# --- the sound codec --------------------------------------------------------------------------------------------------

@cache
def codec() -> tuple[Weights, Weights]:
    return audio.audio_vae(0), audio.vocoder(0)


def long_names(vocoder: Weights) -> Weights:
    """As newer PyTorch names what weight norm stores."""
    return {name.replace(".weight_g", ".parametrizations.weight.original0").replace(
        ".weight_v", ".parametrizations.weight.original1"): tensor for name, tensor in vocoder.items()}


def merged(folder: Path, dtype: torch.dtype) -> tuple[str]:
    """Core's layout: normalised, folded, with the constants of the mel step."""
    return (write(folder / "mmaudio_16k.safetensors", cast(audio_vae.merge(*codec()), dtype)),)


def repacked(folder: Path, name: str, dtype: torch.dtype) -> tuple[str, str]:
    return (write(folder / f"mmaudio_vae_16k_{name}.safetensors", cast(codec()[0], dtype)),
            write(folder / f"mmaudio_vocoder_bigvgan_best_netG_{name}.safetensors", cast(codec()[1], dtype)))


AUDIO_ROWS: dict[str, tuple[Callable[[Path], Written], float]] = {
    "mmaudio-originals": (lambda d: (write(d / "v1-16.pth", codec()[0]),
                                     write(d / "best_netG.pt", {"generator": codec()[1]})), 0.0),
    "mmaudio-originals-long-names": (lambda d: (
        write(d / "v1-16.pth", codec()[0]), write(d / "best_netG.pt", {"generator": long_names(codec()[1])})), 0.0),
    "mmaudio-fp32": (lambda d: repacked(d, "fp32", FP32), 0.0),
    "mmaudio-bf16": (lambda d: repacked(d, "bf16", BF16), 0.1),
    "mmaudio-merged-fp32": (lambda d: merged(d, FP32), 0.0),
    "mmaudio-merged-bf16": (lambda d: merged(d, BF16), 0.1),
}


def sound(paths: Written) -> Tensor:
    return audio_vae.decode_waveform(audio_vae.load_audio_vae(*paths), noise(1, 20, 10, seed=4))


@pytest.mark.parametrize("row", AUDIO_ROWS)
def test_audio_vae(row, tmp_path):
    make, bound = AUDIO_ROWS[row]
    plain = sound((write(tmp_path / "vae.safetensors", codec()[0]),
                   write(tmp_path / "vocoder.safetensors", codec()[1])))
    found = sound(make(tmp_path))
    assert plain.std() > 0.02
    assert relative_l2(found, plain) <= bound
    assert bound == 0 or not torch.equal(found, plain)


# --- the table for people ---------------------------------------------------------------------------------------------

def test_the_documented_table_is_what_is_tested():
    document = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([^`]+)` \|", document, re.MULTILINE)
    assert sorted(documented) == sorted([*ROWS, *TEXT_ROWS, *AUDIO_ROWS])
