"""What the benchmarks run on: the transformer at real and reduced sizes with random weights, and inputs for it.

`prepare()` comes first: it makes ComfyUI and the pack importable and chooses PyTorch's attention on every device.
Random weights take the time and memory that trained ones take.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TEXT_TOKENS = 512


def prepare() -> torch.device:
    """Make ComfyUI, the pack (`ovi_native`) and the tiny models importable; returns the device to measure on."""
    if str(ROOT / "tools") not in sys.path:
        sys.path.insert(0, str(ROOT / "tools"))
    import with_comfyui
    from devlib import pack

    pack.load_package()
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    with_comfyui.choose_device()
    from ovi_native.ovi_model.ovi import supported_models

    supported_models.register()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Subject:
    """A transformer and a clip: sizes as in `tiny.sizes`, latents of the clip, precision."""

    heads: int  # of 128
    blocks: int
    ffn: int
    text: int  # width of the text embedding
    video: tuple[int, int, int]  # latent frames, rows, columns
    audio: int  # latents, and tokens
    dtype: torch.dtype = field(default=torch.float32)

    @property
    def sizes(self):
        from tiny.sizes import Sizes

        return Sizes(self.heads, self.blocks, self.ffn, self.text)

    @property
    def tokens(self) -> int:
        """Video tokens: one for 2 x 2 latent pixels."""
        frames, rows, columns = self.video
        return frames * (rows // 2) * (columns // 2)

    def describe(self) -> dict[str, Any]:
        return {"dim": 128 * self.heads, "heads": self.heads, "blocks": self.blocks, "ffn": self.ffn,
                "video_tokens": self.tokens, "audio_tokens": self.audio, "dtype": str(self.dtype).split(".")[1]}


FULL = Subject(24, 30, 14336, 4096, (31, 44, 44), 157, torch.bfloat16)
REDUCED = Subject(8, 4, 4096, 4096, (8, 32, 32), 42)
QUICK = Subject(2, 2, 512, 64, (3, 12, 12), 16)


def choose(device: torch.device, quick: bool) -> Subject:
    """The released model on a GPU, a reduced one on a CPU."""
    return QUICK if quick else FULL if device.type == "cuda" else REDUCED


def make_network(subject: Subject, device: torch.device, seed: int = 0):
    """The network alone with random weights, made on the device."""
    import comfy.ops
    from tiny import fake_gpu

    network = fake_gpu.make_network(subject.sizes, comfy.ops.disable_weight_init, device, subject.dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in network.eval().requires_grad_(False).named_parameters():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.normal_(gain, 0.02 if weight.ndim > 1 else 0.1, generator=generator)
    return network


def make_patcher(subject: Subject, seed: int = 0):
    """The same as a ComfyUI MODEL, through core's loader."""
    import comfy.sd
    from tiny.sizes import core_layout, tensor_shapes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in core_layout(tensor_shapes(subject.sizes)).items():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        drawn = torch.empty(shape, device=device).normal_(gain, 0.02 if len(shape) > 1 else 0.1, generator=generator)
        weights[name] = drawn.to("cpu", subject.dtype)
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": subject.dtype})


def make_inputs(subject: Subject, device: torch.device, batch: int = 1, seed: int = 1) -> tuple:
    """(latents [video, audio], timestep, text of 100 tokens) for a call of the network."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(subject.dtype)

    latents = [draw(batch, 48, *subject.video), draw(batch, 20, subject.audio)]
    return latents, torch.full((batch,), 700.0, device=device), draw(batch, 100, subject.text)


def make_step(network, inputs: tuple):
    """A pass as a sampling's step makes it: `step(options)`."""
    latents, timestep, context = inputs

    @torch.no_grad()
    def step(options: dict | None = None):
        return network(latents, timestep, context, {} if options is None else options)

    return step
