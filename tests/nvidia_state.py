"""ComfyUI's two ways to load: as with `--cpu`, and as `main.py` sets it on an NVIDIA installation (DynamicVRAM).

With DynamicVRAM on, weight files come as read-only mappings, core's `Linear` and `Embedding` have no parameters before
a state dict arrives, and `CoreModelPatcher` is `ModelPatcherDynamic`. All of that is set here without a GPU. What
remains unseen: on a CPU `ModelPatcherDynamic` gives way to the ordinary `ModelPatcher`, so models that compute in these
tests are the static copies that conditioning hooks and torch.compile ask for. `pretend_cuda` gives the dynamic patcher
too, for what happens before anything is moved to the GPU.

    pytestmark = pytest.mark.usefixtures("either_loading")     # every test of a module in both states
    def test_x(dynamic_loading): ...                           # one test, with DynamicVRAM on
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy_aimdo.control
import pytest
import torch

CUDA = torch.device("cuda", 0)


@contextlib.contextmanager
def dynamic_vram(on: bool = True) -> Iterator[None]:
    """The loading state of `main.py` with DynamicVRAM on (or off); what was there before is back afterwards.

    The library itself stays loaded: tensors that outlive this still close their files with it.
    """
    if on:
        _load_library()
    with pytest.MonkeyPatch.context() as patch:
        patcher = comfy.model_patcher.ModelPatcherDynamic if on else comfy.model_patcher.ModelPatcher
        patch.setattr(comfy.model_patcher, "CoreModelPatcher", patcher)
        patch.setattr(comfy.memory_management, "aimdo_enabled", on)
        yield


def _load_library() -> None:
    """Load comfy-aimdo's library, as `main.py` does before it imports the modules that bind its functions."""
    if comfy_aimdo.control.lib is not None:
        return
    if not comfy_aimdo.control.init("cuda"):
        pytest.skip("comfy-aimdo has no library for this system")
    for name in ("model_mmap", "host_buffer", "model_vbar", "vram_buffer"):
        importlib.reload(importlib.import_module(f"comfy_aimdo.{name}"))


@contextlib.contextmanager
def pretend_cuda() -> Iterator[None]:
    """ComfyUI as on a 24 GB card that does everything: models load for `cuda:0` from the CPU and are never moved."""
    management = comfy.model_management
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "get_torch_device", lambda: CUDA)
        patch.setattr(management, "unet_offload_device", lambda: torch.device("cpu"))
        patch.setattr(management, "get_total_memory", lambda *_, **__: 24 << 30)
        for name in ("should_use_bf16", "should_use_fp16", "supports_fp8_compute", "supports_nvfp4_compute",
                     "supports_mxfp8_compute"):
            patch.setattr(management, name, lambda *_, **__: True)
        yield


@pytest.fixture(params=[False, True], ids=["static", "aimdo"])
def either_loading(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both loading states in turn; the value says whether DynamicVRAM is on."""
    with dynamic_vram(request.param):
        yield request.param


@pytest.fixture
def dynamic_loading() -> Iterator[None]:
    """The loading state with DynamicVRAM on."""
    with dynamic_vram():
        yield
