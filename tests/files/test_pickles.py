"""PyTorch files: what is read equals what PyTorch reads, and what a file asks for beyond its weights is not given."""

import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import comfy.model_management
import comfy.utils
import numpy as np
import pytest
import torch
from ovi_native.ovi_model.files.reader import load_weights
from support import hostile_pickles

BASE = torch.arange(60.0).reshape(3, 4, 5)


def kinds() -> dict[str, torch.Tensor]:
    """Tensors of every kind that weight files hold, views of shared storages among them."""
    floats = {str(dtype): torch.linspace(-2, 2, 24).reshape(4, 6).to(dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)}
    whole = {str(dtype): torch.arange(6).to(dtype) for dtype in (
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}
    return {**floats, **whole, "scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0, 2), "view": BASE[1:, :, 2],
            "turned": BASE.transpose(0, 2), "whole": BASE, "wide": torch.zeros(2, 1).expand(2, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)), "buffer": torch.nn.Parameter(torch.ones(2), False),
            "text ☃": torch.zeros(1)}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_equals_pytorch(tmp_path, monkeypatch, zipped, mapped):
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", not mapped)
    path = tmp_path / "weights.pth"
    content = OrderedDict((name, tensor) for name, tensor in kinds().items() if zipped or "float8" not in name)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)  # it writes no fp8 that it could read there
    expected, (found, _) = torch.load(path, weights_only=True), load_weights(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        same = found[name]
        assert (same.dtype, same.shape, same.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        assert torch.equal(same.contiguous().reshape(-1).view(torch.uint8),
                           tensor.detach().contiguous().reshape(-1).view(torch.uint8)), name
        assert type(same) is torch.Tensor and not same.requires_grad
    if not mapped:  # the file may be replaced while the model lives
        path.write_bytes(bytes(path.stat().st_size))
        assert torch.equal(found["whole"], BASE)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_leaves_beside_the_weights(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimiser = torch.optim.AdamW(module.parameters())
    module(torch.randn(4, 3)).sum().backward()
    optimiser.step()
    content = {"epoch": 3, "lr": 1e-4, "loss": np.float64(0.25), "shape": torch.Size([1, 2]), "big": 2**70,
               "device": torch.device("cpu"), "dtype": torch.bfloat16, "rng": torch.get_rng_state(), "none": None,
               "model": module.state_dict(), "ema_model": module.state_dict(), "optimizer": optimiser.state_dict(),
               "names": ["a", ("b", 1.5, True)], "bytes": b"abc", 7: "seven", "itself": {}}
    content["itself"]["again"] = content
    torch.save(content, tmp_path / "run.ckpt", _use_new_zipfile_serialization=zipped)
    found, _ = load_weights(tmp_path / "run.ckpt")
    assert list(found) == list(module.state_dict())
    assert all(torch.equal(found[name], value) for name, value in module.state_dict().items())


def test_a_full_size_table_of_names_is_quick(tmp_path):
    content = {"generator": {f"model.blocks.{i}.self_attn.q.weight": torch.zeros(2, 2) for i in range(4000)}}
    torch.save({**content, "generator_ema": dict(content["generator"])}, tmp_path / "w.pt")
    start = time.process_time()
    assert len(load_weights(tmp_path / "w.pt")[0]) == 4000
    assert time.process_time() - start < 5


# --- hostile files ----------------------------------------------------------------------------------------------------

SHARED = Path(__file__).resolve().parents[3] / "shared" / "repro" / "files"
HARMLESS = {"encoding", "doubling", "a far place of the memo"}  # they open, and hold no weights


class Code:
    """What runs a command when Python's own pickle loads it."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_beside_code_are_refused(tmp_path, zipped):
    """Whatever the name: only those that weights need are known, and none is called."""
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.ones(2), "x": Code()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError, match=rf"{path.name}.*{os.name}.system"):
        load_weights(path)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each hostile file, by its name; all in one process, with 1 GB to spare."""
    if sys.platform != "linux":
        pytest.skip("memory limits and figures are Linux's")
    folder, paths = tmp_path_factory.mktemp("hostile"), {}
    for index, (name, make) in enumerate(hostile_pickles.FILES.items()):
        paths[name] = folder / f"hostile_{index}.pth"
        paths[name].write_bytes(make())
    paths.update({path.name: path for path in sorted(SHARED.glob("*.pth"))})
    done = subprocess.run([sys.executable, hostile_pickles.__file__, *map(str, paths.values())], capture_output=True,
                          text=True, timeout=300, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (folder / "executed").exists()
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {name: (path, line) for (name, path), line in zip(paths.items(), lines, strict=True)}


@pytest.mark.parametrize("name", [*hostile_pickles.FILES, "hang_486kB.pth", "mem_468_bytes.pth", "mem_DATA_PKL.pth"])
def test_hostile_files(outcomes, name):
    if name not in outcomes:
        pytest.skip("a file that is kept elsewhere; its equivalent is made here")
    path, found = outcomes[name]
    assert found["error"] is not None, "it was loaded"
    kind, sentence = found["error"]
    assert kind == "RuntimeError" and path.name in sentence and sentence.isprintable() and len(sentence) < 600
    assert "download it again" in sentence or "download the file again" in sentence or "holds no tensors" in sentence
    assert found["seconds"] < 10
    assert found["grown"] < 4 * path.stat().st_size + (100 << 20)


def test_cancelling_stops_the_reading(tmp_path):
    (tmp_path / "long.pth").write_bytes(hostile_pickles.zipped(b"(" + b"}" * 100_000 + b"t"))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        load_weights(tmp_path / "long.pth")


def test_says_which_name_is_not_needed(tmp_path):
    (tmp_path / "w.pth").write_bytes(hostile_pickles.zipped(hostile_pickles.PROGRAMS["an empty tensor"]))
    with pytest.raises(RuntimeError, match=r"w\.pth cannot be read as plain weights \(it uses torch\.Tensor, which"):
        load_weights(tmp_path / "w.pth")
