"""tools/convert.py on files of full width: memory, an interrupted run, and what it plans for the released model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import convert as tool
import pytest
import torch
from converting import conversion
from converting.conversion import Job
from ovi_native.ovi_model.files.safetensors_file import Spec, make_header
from ovi_native.ovi_model.ovi import layouts
from ovi_native.ovi_model.ovi.quant_recipe import FORMATS
from safetensors import safe_open
from tiny.sizes import Sizes, tensor_shapes

pytestmark = pytest.mark.slow

WIDE = Sizes(heads=24, ffn=14336, text=4096, blocks=2)
"""The real model's widths, 2 of its 30 blocks."""
RUN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert
code = convert.main(sys.argv[1:])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
sys.exit(code)
"""


def sparse_checkpoint(path, sizes):
    """A file of zeros in the released layout that takes no disk space; returns its size."""
    specs = {name: Spec(torch.bfloat16, tuple(shape)) for name, shape in tensor_shapes(sizes).items()}
    header, _, size = make_header(specs, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    return size


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """2.9 GB at the real model's widths below 2 GB of memory; `benchmarks/conversion.py` does the full 23 GB."""
    size = sparse_checkpoint(tmp_path / "wide_960.safetensors", WIDE)
    output = tmp_path / "out.safetensors"
    try:
        command = [tmp_path / "wide_960.safetensors", output, "--dtype", "int8", "--device", "cpu"]
        done = subprocess.run([sys.executable, "-c", RUN, Path(tool.__file__).parent, *command],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
        assert size > 2.8e9 and peak < 2e9, f"{peak / 1e9:.2f} GB for a file of {size / 1e9:.2f} GB"
        assert "48 layers quantised" in done.stdout and output.stat().st_size < 0.75 * size
        with safe_open(output, "pt") as file:
            assert not file.get_tensor("audio_model.blocks.1.ffn.2.weight").any()
    finally:
        output.unlink(missing_ok=True)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupted_run_leaves_nothing(tmp_path):
    sparse_checkpoint(tmp_path / "in.safetensors", WIDE)
    process = subprocess.Popen([sys.executable, tool.__file__, str(tmp_path / "in.safetensors"),
                                str(tmp_path / "out.safetensors"), "--dtype", "nvfp4", "--device", "cpu"],
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out*.part")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list(tmp_path.glob(".out*.part")), process.stderr.read() if process.poll() is not None else "never began"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130 and "interrupted; nothing was written" in process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_the_full_model_is_planned_as_it_should_be(tmp_path):
    """Names, layers and size of the real model's output, from the header alone."""
    sizes = Sizes(heads=24, ffn=14336, text=4096, blocks=30)
    sparse_checkpoint(tmp_path / "model_960x960.safetensors", sizes)
    job = Job((str(tmp_path / "model_960x960.safetensors"),), tmp_path / "out.safetensors", dtype="fp8_scaled")
    sources, report = conversion.open_sources(job)
    assert report.variant == "960x960_5s" and report.parameters == 11_660_753_108
    (specs,), quantised = conversion.plan(sources, job, FORMATS["fp8_scaled"].for_blocks(report.blocks))
    assert quantised == 2 * 28 * 12
    assert 13.0e9 < sum(spec.nbytes for spec in specs.values()) < 13.2e9
    assert specs["blocks.1.ffn.0.weight"].dtype == torch.bfloat16
    assert specs["audio_model.blocks.2.ffn.0.weight"] == Spec(torch.float8_e4m3fn, (14336, 3072))
    assert specs["audio_model.blocks.2.ffn.0.weight_scale"] == Spec(torch.float32, ())
    assert layouts.find_towers(specs)[1:] == ("", "audio_model.")
