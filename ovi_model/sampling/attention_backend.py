"""Which attention backend a model uses, by core's seam for it (`optimized_attention_override`).

Core registers the backends whose packages import, whatever the device can run, and replaces one
that fails by PyTorch's, with a line in the log for every call. So a backend is tried once when it
is chosen, and refused in words. FlashAttention 3, which core does not know, is added here.

Shapes: B batch, N tokens, H heads, D their width.
"""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from comfy.ldm.modules.attention import attention_pytorch, get_attention_function
from torch import Tensor

OVERRIDE = "optimized_attention_override"
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One choice. registered: core's name for it, None for ours. half: bf16 and fp16 alone."""

    title: str
    registered: str | None
    missing: str = ""
    hardware: str = ""
    half: bool = False


BACKENDS = {
    "pytorch": Backend("PyTorch's scaled_dot_product_attention", "pytorch"),
    "flash 2": Backend("FlashAttention 2", "flash", "Install it with 'pip install flash-attn'.",
                       "It needs an NVIDIA GPU of the RTX 30 series or newer, or an AMD GPU its "
                       "ROCm build supports.",
                       half=True),
    "flash 3": Backend("FlashAttention 3", None,
                       "Build it from the folder 'hopper' of github.com/Dao-AILab/flash-attention.",
                       "It is made for NVIDIA's Hopper GPUs (H100, H200).", half=True),
    "sage": Backend("SageAttention", "sage", "Install it with 'pip install sageattention'.",
                    "It needs an NVIDIA GPU of the RTX 30 series or newer.", half=True),
    "sage 3": Backend("SageAttention 3", "sage3",
                      "Build it from the folder 'sageattention3_blackwell' of "
                      "github.com/thu-ml/SageAttention.",
                      "It needs an NVIDIA Blackwell GPU (RTX 50 series, B200).", half=True),
    "xformers": Backend("xFormers", "xformers",
                        "Install it with 'pip install xformers' and start ComfyUI without "
                        "--disable-xformers.",
                        "It needs a GPU."),
    "sub-quadratic": Backend("sub-quadratic attention", "sub_quad"),
}
"""Every choice by its name in workflows; what is not installed is refused when it is chosen."""


@cache
def flash3_operator() -> Callable | None:
    """FlashAttention 3 as one operator, opaque to torch.compile; None where it is not installed."""
    try:
        kernel = importlib.import_module("flash_attn_interface").flash_attn_func
    except (ImportError, AttributeError):
        return None

    @torch.library.custom_op("ovi::flash_attention_3", mutates_args=())
    def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kernel(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # early versions add the softmax's sums

    @flash3.register_fake
    def _(q, k, v):  # noqa: ARG001 (the operator's signature)
        return q.new_empty(q.shape)

    return flash3


def attention_flash3(operator: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None,
                     **options) -> Tensor:
    """`flash3_operator` on q, k, v [B, N, H * D] as core calls attention.

    PyTorch's for what the networks here never ask of it.
    """
    others = ("skip_reshape", "skip_output_reshape", "enable_gqa", "scale")
    if mask is not None or any(options.get(name) for name in others):
        return attention_pytorch(q, k, v, heads, mask=mask, **options)
    return operator(*(x.unflatten(-1, (heads, -1)) for x in (q, k, v))).flatten(2)


def find(name: str) -> Callable | None:
    """The function of a backend as core calls it, None where it is not installed."""
    backend = BACKENDS[name]
    if backend.registered is not None:
        return get_attention_function(backend.registered, None)
    flash3 = flash3_operator()
    return None if flash3 is None else partial(attention_flash3, flash3)


class Complaints(logging.Handler):
    """What core's attention functions say while this is attached."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record):
        if record.module == "attention":
            self.messages.append(record.getMessage())


def trial(attend: Callable, device: torch.device, dtype: torch.dtype) -> str:
    """Run a backend once as a tower would; what is wrong with it, or nothing.

    On 1,152 tokens in two heads of 128: some leave fewer than 1,024 tokens to PyTorch. Approximate
    ones may be a tenth off.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1152, 256, generator=generator).to(device, dtype) for _ in range(3))
    complaints, log = Complaints(), logging.getLogger()
    log.addHandler(complaints)
    try:
        found = attend(q, k, v, heads=2).float()
    except Exception as error:  # whatever a foreign package raises is the reason to give
        return f"{type(error).__name__}: {error}"
    finally:
        log.removeHandler(complaints)
    if complaints.messages:
        return complaints.messages[0]
    exact = attention_pytorch(q, k, v, heads=2).float()
    off = float((found - exact).norm() / exact.norm())
    return "" if off < 0.3 else f"its result is {off:.0%} off"


def check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RuntimeError with what to do if this machine cannot use a backend.

    Raises ValueError if no such backend exists.
    """
    if name not in BACKENDS:
        raise ValueError(f"Unknown attention {repr(name)[:100]}. Choose one of: auto, "
                         f"{', '.join(BACKENDS)}.")
    backend, otherwise = BACKENDS[name], "Or choose 'auto'."
    attend = find(name)
    if attend is None:
        raise RuntimeError(f"{backend.title} is not installed in this ComfyUI. {backend.missing} "
                           f"{backend.hardware} {otherwise}")
    if backend.half and dtype not in HALF:
        raise RuntimeError(f"{backend.title} computes in bf16 or fp16, but this model computes in "
                           f"{str(dtype).removeprefix('torch.')} on {device}. Choose weight_dtype "
                           f"'bf16' in 'Load Ovi Model' on a GPU that has it. {otherwise}")
    wrong = trial(attend, device, dtype)
    if wrong:
        raise RuntimeError(f"{backend.title} is installed but does not work on {device} in "
                           f"{str(dtype).removeprefix('torch.')}: {wrong}. {backend.hardware} "
                           f"{otherwise}")


def works(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine can use a backend."""
    try:
        check(name, device, dtype)
    except RuntimeError:
        return False
    return True


def set_attention(model, name: str):
    """Return a clone of MODEL that computes attention by a backend, "auto" for core's choice.

    `check` must have passed it.
    A model in fp32 (after 'ModelComputeDtype', say) goes to PyTorch where the backend has no fp32,
    as core does it.
    """
    model = model.clone()
    options = model.model_options["transformer_options"]
    if name == "auto":
        options.pop(OVERRIDE, None)
        return model
    attend, half = find(name), BACKENDS[name].half
    assert attend is not None, f"{name} was not checked"

    def override(_, q, *args, **kwargs):
        return (attend if q.dtype in HALF or not half else attention_pytorch)(q, *args, **kwargs)

    options[OVERRIDE] = override
    return model
