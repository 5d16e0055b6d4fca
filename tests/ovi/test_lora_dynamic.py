"""'Load Ovi LoRA' on a model that ComfyUI loads dynamically, as on every default NVIDIA installation."""

import comfy.model_management
import pytest
import torch
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.ovi.lora_keys import GROUPS, apply_lora, read_lora
from support.loading_state import DynamicOnCpu, dynamic_vram
from support.lora_hooks import lora, sample, with_hooks
from tiny.compare import assert_pair_close, assert_pair_equal, relative_l2
from tiny.inputs import conditioning, noise
from tiny.models import tiny_model, write_checkpoint
from tiny.sizes import Sizes

NAME = "model_960x960.safetensors"
SMALL = Sizes(heads=1, blocks=2)
STRENGTHS = dict(zip(GROUPS, (0.5, 1.0, 1.0, -0.7), strict=True))


@pytest.fixture
def static():
    return tiny_model(sizes=SMALL)


@pytest.fixture
def dynamic(static, tmp_path):  # noqa: ARG001 (the static one is made before DynamicVRAM is on)
    path = write_checkpoint(tmp_path, NAME, SMALL, dtype=torch.float32)
    with dynamic_vram(patcher=DynamicOnCpu):
        yield checkpoint.load_model(str(path), torch.float32)[0]
        comfy.model_management.unload_all_models()


def patched(patcher):
    """With LoRA under Ovi's names on matrices and on tables of modulation."""
    tensors = {key.replace("diffusion_model.blocks", "video_model.blocks").removeprefix("diffusion_model."): tensor
               for key, tensor in lora(patcher).items()}
    for table in ("video_model.blocks.1.modulation.modulation", "audio_model.blocks.0.modulation"):
        tensors[f"{table}.diff"] = noise(1, 6, SMALL.dim, seed=len(table))
    return apply_lora(patcher, read_lora(patcher.model, tensors, "x"), STRENGTHS)


def test_computes_what_a_static_model_does_and_leaves_no_trace(dynamic, static):
    positive = conditioning(7, 1)
    plain, truth = sample(static, positive), sample(patched(static), positive)
    assert relative_l2(truth.unbind()[0], plain.unbind()[0]) > 1e-3
    assert_pair_close(sample(patched(dynamic), positive), truth, 1e-5)
    assert_pair_equal(sample(dynamic, positive), plain)
    assert_pair_close(sample(patched(dynamic), positive), truth, 1e-5)


def test_hooks_come_on_top_in_the_static_copy_that_they_get(dynamic, static):
    hooked = with_hooks(conditioning(7, 1), lora(static))
    truth = sample(patched(static), hooked)
    assert relative_l2(truth.unbind()[0], sample(patched(static), conditioning(7, 1)).unbind()[0]) > 1e-3
    assert_pair_close(sample(patched(dynamic), hooked), truth, 1e-5)
    assert_pair_equal(sample(dynamic, conditioning(7, 1)), sample(static, conditioning(7, 1)))
