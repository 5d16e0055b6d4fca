"""Every weight file in circulation, as a small random file in that exact layout; `docs/formats.md` lists the rows.

Each is loaded by the loader its node calls, and what the model computes is compared with the plain upstream file of the
same weights: equal where the file loses nothing; else equal to what its stored numbers say, and close to the original.
"""

from pathlib import Path

import pytest
import torch
from ovi_native.ovi_model.ovi import checkpoint
from support.formats import (
    BF16,
    FP32,
    ROWS,
    SIZES,
    Weights,
    audio_half,
    cast,
    original,
    rounds_activations,
    video_half,
    write,
)
from tiny.compare import relative_l2
from tiny.inputs import noise, text
from tiny.models import network
from torch import Tensor

LATENTS = [noise(1, 48, 2, 4, 4, seed=1), noise(1, 20, 9, seed=2)]


def predict(patcher) -> list[Tensor]:
    """Velocities of the network at one fixed input."""
    with torch.no_grad():
        return network(patcher)(LATENTS, torch.tensor([600.0]), text(6, 3), {})


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[torch.dtype, list[Tensor]]:
    """What the plain upstream files compute, in the two precisions they are published in."""
    folder = tmp_path_factory.mktemp("plain")
    return {dtype: predict(checkpoint.load_model(write(folder / "model.safetensors", cast(original(), dtype)))[0])
            for dtype in (BF16, FP32)}


def upstream_fp32(folder: Path, weights: Weights) -> list[Tensor]:
    """What the plain upstream file of these numbers computes."""
    return predict(checkpoint.load_model(write(folder / "truth.safetensors", weights))[0])


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(relative_l2(a, b) for a, b in zip(found, expected, strict=True))


BOTH_STATES = (  # one row of each way in which a file is read, stored and quantised; the others differ in names alone
    "upstream-bf16", "upstream-fp16", "upstream-fp32", "upstream-fp8-e4m3fn", "kijai-split-second-file",
    "kijai-joint-fp8-scaled-0-d-marker", "kijai-joint-fp8-scaled-empty-marker", "wangp-split-quanto-int8",
    "core-comfy-quant", "core-quantization-metadata", "pt-plain", "pt-parameters")


@pytest.mark.parametrize(("row", "either_loading"), [
    *((row, False) for row in ROWS), *((row, True) for row in BOTH_STATES)], indirect=["either_loading"])
@pytest.mark.usefixtures("either_loading")
def test_model(row, tmp_path, plain):
    case = ROWS[row]
    paths, meant = case.make(tmp_path, original())
    patcher, report = checkpoint.load_model(paths[0], None, *paths[1:])
    found = predict(patcher)
    assert torch.equal(plain[BF16][0], plain[FP32][0])
    if case.bound:
        assert 0 < worst(found, plain[FP32]) < case.bound
        rounds = "int8" in row or rounds_activations(row)
        assert worst(found, upstream_fp32(tmp_path, meant)) < (case.bound if rounds else 1e-5)
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, plain[FP32], strict=True))
    assert (report.layout, report.variant) == (case.layout, case.variant), report
    assert case.precision in report.precision and report.blocks == SIZES.blocks
    assert report.parameters == sum(tensor.numel() for tensor in original().values())
    assert all(Path(path).name in str(report) for path in paths)


# --- which of the three models a file is (by its name: test_which_variant.py) -----------------------------------------


def test_variant_by_metadata(tmp_path):
    """It counts more than the name; an unknown one counts nothing; what the user sets counts most."""
    path = write(tmp_path / "model_960x960.safetensors", cast(original(), BF16), {"ovi_variant": "960x960_10s"})
    assert checkpoint.load_model(path)[1].variant == "960x960_10s"
    assert checkpoint.load_model(path, None, None, "720x720_5s")[1].variant == "720x720_5s"


def test_variant_by_the_second_file(tmp_path):
    video = write(tmp_path / "half_a.safetensors", video_half(original()))
    audio = write(tmp_path / "half_b_10s.safetensors", audio_half(original()))
    assert checkpoint.load_model(video, None, audio)[1].variant == "960x960_10s"
