"""ComfyUI's two ways to load: as with `--cpu`, and as `main.py` sets it on an NVIDIA installation (DynamicVRAM).

With DynamicVRAM on, weight files come as read-only mappings, core's `Linear` and `Embedding` have no parameters before
a state dict arrives, and `CoreModelPatcher` is `ModelPatcherDynamic`. All of that is set here without a GPU. On a CPU
`ModelPatcherDynamic` gives way to the ordinary `ModelPatcher`, so that models that compute are the static copies that
conditioning hooks and torch.compile ask for. Two ways around that: `pretend_cuda`, for what happens before anything is
moved to the GPU, and `DynamicOnCpu`, which computes.

What remains unseen without a GPU: comfy-aimdo's address space and its faults, pinned memory, streams, prefetching with
numbers, and whatever the models' code would do on another device.

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


class DynamicOnCpu(comfy.model_patcher.ModelPatcherDynamic):
    """Core's dynamic patcher where it would give way to the ordinary one: everything but the GPU's side of it.

    Weights stay in their file, small ones are loaded by force, patches wait beside their layers, hooks get a static
    copy. On a GPU those patches are applied to what comfy-aimdo brought in; here as a layer casts its weight.
    """

    def __new__(cls, *_args, **_kwargs):
        return object.__new__(cls)

    def load(self, *args, **kwargs):
        super().load(*args, **kwargs)
        for module in self.model.modules():
            for name in ("weight", "bias"):
                patch = getattr(module, f"{name}_lowvram_function", None)
                if patch is not None:
                    setattr(module, f"{name}_function", [patch])

    def partially_unload(self, _device, memory_to_free=0, force_patch_weights=False):
        assert not force_patch_weights
        return self.restore_loaded_backups() if memory_to_free else 0


@contextlib.contextmanager
def dynamic_vram(on: bool = True, patcher: type | None = None) -> Iterator[None]:
    """The loading state of `main.py` with DynamicVRAM on (or off); what was there before is back afterwards.

    patcher: in place of `ModelPatcherDynamic`. The library itself stays loaded: tensors that outlive this still close
    their files with it.
    """
    if on and not load_library():
        pytest.skip("comfy-aimdo has no library for this system")
    with pytest.MonkeyPatch.context() as patch:
        usual = comfy.model_patcher.ModelPatcherDynamic if on else comfy.model_patcher.ModelPatcher
        patch.setattr(comfy.model_patcher, "CoreModelPatcher", patcher or usual)
        patch.setattr(comfy.memory_management, "aimdo_enabled", on)
        yield


def load_library() -> bool:
    """Load comfy-aimdo's library, as `main.py` does before it imports the modules that bind its functions."""
    if comfy_aimdo.control.lib is not None:
        return True
    if not comfy_aimdo.control.init("cuda"):
        return False
    for name in ("model_mmap", "host_buffer", "model_vbar", "vram_buffer"):
        importlib.reload(importlib.import_module(f"comfy_aimdo.{name}"))
    return True


def switch_on() -> None:
    """For a server process: DynamicVRAM from here on, computing on the CPU."""
    assert load_library()
    comfy.model_patcher.CoreModelPatcher = DynamicOnCpu
    comfy.memory_management.aimdo_enabled = True


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
