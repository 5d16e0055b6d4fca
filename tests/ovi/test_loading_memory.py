"""Loading never holds a second copy; changing models over and over leaves nothing behind.

Figures are of a process that loads one 440 MB file (880 MB in float32) and then reads every weight once. "own" is the
most memory that is no file's (`RssAnon`): once the model, and 10 %. "peak" is resident memory with the mapped pages of
the file, which the system takes back as it needs them; after loading the file is let go. With DynamicVRAM, where core
leaves a model in its file, next to nothing is the model's own.
"""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy_extras.nodes_custom_sampler import RandomNoise
from ovi_native.ovi_model.files.safetensors_file import Spec, make_header
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.ovi.guider import make_guider
from ovi_native.ovi_model.sampling import solvers
from safetensors.torch import load_file, save_file
from tiny.checkpoint import draw_weights
from tiny.inputs import conditioning, first_frame_mask, joint
from tiny.sizes import Sizes, tensor_shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory figures are Linux's"),
]

LARGE, SMALL = Sizes(heads=8, blocks=4, ffn=4096, text=512), Sizes(heads=1, blocks=1)
SCRIPT = Path(__file__).with_name("loading_memory.py")
SLACK = 16 << 20  # of the interpreter, beside 10 %


def write_zeros(path: Path, sizes: Sizes, dtype: torch.dtype, part: str = "", strip: str = "") -> Path:
    """A file that is all zeros and takes no space on disk; its pages count in memory all the same."""
    shapes = {name: tuple(shape) for name, shape in tensor_shapes(sizes).items() if name.startswith(part)}
    if path.suffix == ".pt":
        torch.save({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, path)
        return path
    header, _, size = make_header({name.removeprefix(strip): Spec(dtype, shape) for name, shape in shapes.items()}, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files the cases name."""
    at = tmp_path_factory.mktemp("large")
    for name, dtype in (("upstream_bf16.safetensors", torch.bfloat16), ("upstream_bf16.pt", torch.bfloat16),
                        ("upstream_fp32.safetensors", torch.float32)):
        write_zeros(at / name, LARGE, dtype)
        write_zeros(at / f"small_{name}", SMALL, dtype)
    for sizes, start in ((LARGE, ""), (SMALL, "small_")):
        write_zeros(at / f"{start}video.safetensors", sizes, torch.bfloat16, "video_model.", "video_model.")
        write_zeros(at / f"{start}audio.safetensors", sizes, torch.bfloat16, "audio_model.")
    return at


def measure(how: str, dtype: str, path: Path) -> dict:
    small = path.with_name(f"small_{path.name}")
    run = subprocess.run([sys.executable, str(SCRIPT), how, dtype, str(path), str(small)], capture_output=True,
                         text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout)
    names = [path.name, "audio.safetensors"] if path.name == "video.safetensors" else [path.name]
    files = [path.with_name(name) for name in names]
    started = time.perf_counter()
    for file in files:
        with file.open("rb") as content:
            while content.read(1 << 24):
                pass
    result |= {"file": sum(file.stat().st_size for file in files), "raw": time.perf_counter() - started}
    print(f"{how} {path.name} as {dtype}: file {result['file'] >> 20} MiB, weights "  # noqa: T201
          f"{result['weights'] >> 20} MiB, loading +{result['loading'] >> 20} MiB in {result['seconds']:.2f} s, peak "
          f"+{result['peak'] >> 20} MiB ({result['peak'] / result['file']:.2f} x file), first touch after "
          f"{result['with_first_touch']:.2f} s, raw read {result['raw']:.2f} s")
    return result


@pytest.mark.parametrize(("how", "name", "dtype"), [
    ("static", "upstream_bf16.safetensors", "bf16"), ("static", "upstream_bf16.pt", "bf16"),
    ("static", "video.safetensors", "bf16"), ("static", "upstream_fp32.safetensors", "bf16"),
    ("static", "upstream_bf16.safetensors", "default"),  # where there is no GPU: fp32 from a bf16 file
    ("copy", "upstream_fp32.safetensors", "bf16")])
def test_no_second_copy(folder, how, name, dtype):
    found = measure(how, dtype, folder / name)
    assert found["file"] > 400e6
    assert found["kept"] >= 0.9 * found["weights"], "the weights are not in the model's own memory"
    assert found["own"] <= 1.10 * found["weights"] + SLACK, "more than the model was held besides the file's pages"
    assert found["peak"] <= 1.10 * (found["file"] + found["weights"]) + SLACK
    assert found["after"] <= 1.10 * found["weights"] + SLACK, "the file is still in memory"
    assert found["seconds"] < 10


def test_a_dynamic_model_stays_in_its_file(folder):
    """With DynamicVRAM: not read yet, next to nothing; all weights read, the file and 10 %."""
    found = measure("dynamic", "bf16", folder / "upstream_bf16.safetensors")
    assert found["weights"] > 0.99 * found["file"]
    assert found["loading"] <= 0.10 * found["file"] + SLACK
    assert found["own"] <= 0.10 * found["file"] + SLACK
    assert found["peak"] <= 1.10 * found["file"] + SLACK
    assert found["after"] >= 0.9 * found["file"], "the pages of the file are not counted: nothing was measured"
    assert found["seconds"] < 5


def test_a_second_copy_would_be_seen(folder):
    found = measure("twice", "bf16", folder / "upstream_bf16.safetensors")
    assert found["own"] > 1.8 * found["weights"]


def test_changing_weights_does_not_change_the_file(tmp_path):
    """A LoRA merges into the parameters."""
    save_file({name: t.bfloat16() for name, t in draw_weights(SMALL).items()}, tmp_path / "ovi.safetensors")
    before = (tmp_path / "ovi.safetensors").read_bytes()
    patcher, _ = checkpoint.load_model(str(tmp_path / "ovi.safetensors"), torch.bfloat16)
    with torch.no_grad():
        for parameter in patcher.model.diffusion_model.parameters():
            parameter.add_(1)
    assert (tmp_path / "ovi.safetensors").read_bytes() == before
    again, _ = checkpoint.load_model(str(tmp_path / "ovi.safetensors"), torch.bfloat16)
    stored = load_file(tmp_path / "ovi.safetensors")["video_model.head.head.weight"]
    assert torch.equal(again.model.diffusion_model.head.head.weight, stored)
    assert not torch.equal(patcher.model.diffusion_model.head.head.weight, stored)


# --- changing models --------------------------------------------------------------------------------------------------

def generate(patcher) -> None:
    latent = joint(2, 2, 2, seed=5)
    guider = make_guider(patcher, conditioning(4, 1), conditioning(3, 2, audio_tokens=3), 4.0, 3.0, 0)
    guider.sample(RandomNoise.execute(1).result[0].generate_noise({"samples": latent}), latent,
                  solvers.make_sampler("unipc"), solvers.make_sigmas("unipc", 2), denoise_mask=first_frame_mask(latent),
                  disable_pbar=True)


def alive() -> tuple[int, int]:
    """Tensors and their bytes, without those of shapes in symbols that earlier tests' compilers keep."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and type(x.numel()) is int]
    return len(tensors), sum(x.numel() * x.element_size() for x in tensors)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_fifty_changes_of_model_leave_nothing_behind(tmp_path):
    """Load, generate two steps, load another file, and so on; upstream bf16 and a plain fp8 cast in turn."""
    weights = {name: t.bfloat16() for name, t in draw_weights(Sizes(heads=1, blocks=2)).items()}
    save_file(weights, tmp_path / "model_960x960.safetensors")
    save_file({name: t.to(torch.float8_e4m3fn) if t.ndim == 2 and ".blocks." in name else t
               for name, t in weights.items()}, tmp_path / "model_fp8_e4m3fn.safetensors")
    paths = [tmp_path / "model_960x960.safetensors", tmp_path / "model_fp8_e4m3fn.safetensors"]
    seen, before = [], len(comfy.model_management.current_loaded_models)  # fixtures of other tests keep theirs
    for cycle in range(50):
        patcher, _ = checkpoint.load_model(str(paths[cycle % 2]))
        generate(patcher)
        del patcher
        if cycle % 2:
            seen.append((*alive(), resident(), len(comfy.model_management.current_loaded_models)))
    print("tensors, bytes of them, resident bytes, loaded models:", seen[2], "->", seen[-1])  # noqa: T201
    assert len({counts[:2] for counts in seen[2:]}) == 1, seen
    assert max(counts[3] for counts in seen) <= before + 2
    assert seen[-1][2] <= seen[2][2] + (8 << 20), "resident memory grows"
