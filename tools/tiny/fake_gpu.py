"""A GPU of fake tensors: what the model or a VAE would allocate on one, found without one.

Tensors under FakeTensorMode have shapes, types and devices but no data, so a model of the real width runs anywhere.
"""

from __future__ import annotations

import weakref
from typing import Any

import comfy.ops
import torch
from ovi_native.ovi_model.ovi.model import OviModel
from ovi_native.ovi_model.ovi.supported_models import read_sizes
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .models import network, tiny_model
from .sizes import Sizes, core_layout, tensor_shapes


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that come into being on one kind of device: alive now, and at most so far."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type, self.alive, self.peak = device_type, 0, 0
        self.known: set[int] = set()

    def ignore(self, module: torch.nn.Module) -> None:
        """Leave the weights out, of which views are made."""
        self.known |= {parameter.untyped_storage()._cdata for parameter in module.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device_type:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def make_network(sizes: Sizes, operations, device="cpu", dtype: torch.dtype = torch.bfloat16) -> OviModel:
    """The bare network with uninitialised weights; `operations` is the set of ComfyUI's layers it is built of."""
    state = {name: torch.empty(shape, device="meta") for name, shape in core_layout(tensor_shapes(sizes)).items()}
    video: dict[str, Any] = {"dim": sizes.dim, "in_dim": 48, "out_dim": 48, "num_heads": sizes.heads,
                             "ffn_dim": sizes.ffn, "num_layers": sizes.blocks, "patch_size": (1, 2, 2)}
    return OviModel(**video, **read_sizes(state), device=device, dtype=dtype, operations=operations)


def flash_attention(_, q, k, v, heads, **_options):
    """What a fused attention kernel takes on the device: its output, and one float32 per head and row.

    Like a real one it takes tensors of one device only.
    """
    assert k.shape == v.shape and q.device == k.device == v.device, (q.device, k.device, v.device)
    q.new_empty([q.shape[0], heads, q.shape[1]], dtype=torch.float32)
    return torch.empty_like(q)


def fake_inputs(tokens: tuple[int, int, int], batch: int = 1, audio: int | None = None):
    """Latents and text on the fake CUDA device; tokens: (frames, rows, columns) of the video."""
    frames, rows, columns = tokens
    place = {"device": "cuda:0", "dtype": torch.bfloat16}
    latents = [torch.empty(batch, 48, frames, 2 * rows, 2 * columns, **place),
               torch.empty(batch, 20, audio or round(frames * 157 / 31), **place)]
    return (latents, torch.full((batch,), 500.0, device="cuda:0"), torch.empty(batch, 512, 4096, **place),
            {"optimized_attention_override": flash_attention})


def run_on_fake_gpu(operations, tokens, batch=1, blocks=2) -> tuple[int, int]:
    """(peak bytes on the device, bytes of weights) of one joint pass with the weights on the (fake) CPU.

    ComfyUI's streams must be off (`comfy.model_management.NUM_STREAMS = 0`): a fake device has none.
    """
    with FakeTensorMode(), torch.no_grad():
        model = make_network(Sizes(heads=24, blocks=blocks, ffn=14336, text=4096), operations)
        inputs = fake_inputs(tokens, batch)
        with Allocations("cuda") as memory:
            out = model(*inputs)
        assert all(stream.device.type == "cuda" for stream in out)
        return memory.peak, sum(p.numel() * p.element_size() for p in model.parameters())


def tiny_patcher():
    """A small MODEL whose memory estimate is that of the released model's width."""
    patcher = tiny_model(torch.bfloat16)
    patcher.model.memory_usage_factor *= 3072 / network(patcher).dim  # proportional to the width
    return patcher


def estimate(patcher, video: tuple[int, int, int], audio: int, batch: int = 1) -> int:
    """Bytes that ComfyUI keeps free for a pass over latents of video (frames, rows, columns) and `audio` length.

    What a GPU would give needs `comfy.model_management.pytorch_attention_flash_attention` to say yes.
    """
    frames, rows, columns = video
    return int(patcher.model.memory_required([batch, 1, 48 * frames * rows * columns + 20 * audio]))


class FlashAttention(torch.autograd.Function):
    """What a fused attention kernel keeps and takes with gradients: inputs, output and a float32 per head and row."""

    @staticmethod
    def forward(ctx, q, k, v, heads):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty([q.shape[0], heads, q.shape[1]], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, _gradient):
        q, k, v, *_ = ctx.saved_tensors
        q.new_empty(q.shape, dtype=torch.float32)  # the query's gradient is summed up in float32
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def train_on_fake_gpu(tokens: tuple[int, int, int], blocks: int, kept: int, rank: int = 32, batch: int = 1) -> int:
    """Peak bytes of activations and adapters' gradients in one step of a LoRA on all layers, weights in bf16.

    kept: how many of the blocks keep their activations. On a fake CPU, as PyTorch's backward pass wants a real GPU;
    what is allocated is the same.
    """
    from ovi_native.ovi_model.training.lora import Lora, LoraSettings
    from ovi_native.ovi_model.training.network import Velocity, training_mode

    def attention(_function, q, k, v, heads, **_options):
        return FlashAttention.apply(q, k, v, heads)

    frames, rows, columns = tokens
    with FakeTensorMode(), training_mode():
        network = make_network(Sizes(heads=24, blocks=blocks, ffn=14336, text=4096), comfy.ops.manual_cast)
        network.requires_grad_(False)
        lora = Lora(network, LoraSettings(rank), 0, "cpu")
        latents = [torch.empty(batch, 48, frames, 2 * rows, 2 * columns, dtype=torch.bfloat16),
                   torch.empty(batch, 20, round(frames * 157 / 31), dtype=torch.bfloat16)]
        velocity = Velocity(network, torch.bfloat16, blocks - kept)
        velocity.attention = attention
        with lora, Allocations("cpu") as memory:
            memory.ignore(network)
            for module in lora.layers.values():
                memory.ignore(module)
            out = velocity(latents, torch.full((batch,), 500.0), torch.empty(batch, 512, 4096),
                           text_bias=torch.zeros(batch, 512))
            torch.stack([(x.float() ** 2).mean() for x in out if x is not None]).sum().backward()
        return memory.peak
