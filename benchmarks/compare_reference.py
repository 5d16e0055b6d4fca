"""One transformer step, ours and the reference's side by side: `compare_reference.py --reference CHECKOUT`.

Same process, weights, inputs and attention kernel (PyTorch's). The results are compared first; then both are timed in
turn, and the median of the pairwise ratios is printed with its spread. By default a reduced size that a CPU runs in
float32; on a CUDA device the full size in bf16, where the reference uses flash-attn if it is installed.
Needs a checkout of character-ai/Ovi and the packages diffusers and ftfy.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REDUCED = {"dim": 1024, "num_heads": 8, "num_layers": 4, "ffn_dim": 4096, "text_dim": 4096}
FULL = {"dim": 3072, "num_heads": 24, "num_layers": 30, "ffn_dim": 14336, "text_dim": 4096}


def prepare() -> None:
    """Import ComfyUI with PyTorch's attention on any device, and the pack."""
    sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
    from devlib import comfyui

    sys.path.insert(0, str(comfyui.find().path))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.use_pytorch_cross_attention = True
    from devlib.pack import import_pack

    import_pack()


def build(reference: Path, sizes: dict, dtype, device):
    """Return both models with the same random weights."""
    import comfy.sd
    import torch
    from ovi_native.ovi_model import layouts
    from reference import make_reference

    has_flash = device.type == "cuda" and any(map(importable, ("flash_attn", "flash_attn_interface")))
    theirs = make_reference(reference, sizes, dtype, device, replace_attention=not has_flash)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in theirs.named_parameters():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.data.normal_(gain, 0.02 if weight.ndim > 1 else 0.1, generator=generator)
    weights, _ = layouts.read_towers(dict(theirs.state_dict()), {}, "reference")
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})
    return theirs, patcher.model.diffusion_model.to(device), has_flash


def importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def make_steps(theirs, ours, video_size: list[int], audio_length: int, dtype, device):
    """Return (reference step, our step): one forward pass on the same inputs."""
    import torch

    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    video, audio, text = draw(48, *video_size), draw(audio_length, 20), draw(100, 4096)
    t = torch.tensor([700.0], device=device)
    tokens = video_size[0] * video_size[1] * video_size[2] // 4
    audio_channels_first = audio.T[None].contiguous()

    def reference_step():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = theirs(vid=[video], audio=[audio], t=t, vid_context=[text], audio_context=[text],
                         vid_seq_len=tokens, audio_seq_len=audio_length)
        return out[0][0], out[1][0]

    def our_step():
        out = ours([video[None], audio_channels_first], t, text[None], {})
        return out[0][0], out[1][0].T

    return reference_step, our_step, tokens


def seconds(step, device) -> float:
    import torch

    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="checkout of character-ai/Ovi")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--full", action="store_true", help="the real size (default on CUDA)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    prepare()
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = args.full or device.type == "cuda"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    video_size, audio_length = ([31, 44, 44], 157) if full else ([8, 32, 32], 42)
    theirs, ours, has_flash = build(args.reference, FULL if full else REDUCED, dtype, device)
    steps = make_steps(theirs, ours, video_size, audio_length, dtype, device)
    with torch.no_grad():
        (video, audio), (our_video, our_audio) = steps[0](), steps[1]()
        errors = [float((a - b).norm() / a.norm()) for a, b in ((video, our_video), (audio, our_audio))]
        pairs = [(seconds(steps[0], device), seconds(steps[1], device)) for _ in range(args.runs)]
    ratios = sorted(ours / theirs for theirs, ours in pairs)
    result = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(), "dtype": str(dtype), "video_tokens": steps[2],
        "audio_tokens": audio_length, "reference_attention": "flash-attn" if has_flash else "PyTorch",
        "video_error": errors[0], "audio_error": errors[1],
        "reference_seconds": statistics.median(a for a, _ in pairs),
        "our_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1],
    }
    for name, value in result.items():
        print(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
