"""Guidance split over two GPUs by ComfyUI's 'MultiGPU CFG Split': the result of one, and what goes where.

Two kinds of pairs: two CPU "devices" with real numbers, and two GPUs of fake tensors, where a tensor on the wrong one
is an error.
"""

import gc
from collections import Counter

import comfy.model_management
import comfy.multigpu
import pytest
import torch
from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode
from ovi_native.nodes.sampling import OviSampler
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.ovi.guider import make_guider
from ovi_native.ovi_model.sampling import solvers
from support.fake_sampling import STEPS, FakeGpus, endless_memory, prepared
from support.fake_sampling import sample as fake_sample
from support.guidance_nodes import NODES
from support.loading_state import dynamic_vram
from support.step_counters import Operations
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, assert_pair_equal, relative_l2
from tiny.inputs import conditioning, first_frame_mask, joint
from tiny.models import Batches, load, write_checkpoint
from tiny.sizes import TINY

SECOND = torch.device("cpu", 0)  # to ComfyUI another device than torch.device("cpu")
SKIPPED = 1


@pytest.fixture(scope="module", params=[False, True], ids=["static", "aimdo"])
def model(request, tmp_path_factory):
    """The model without DynamicVRAM and with it; that state lasts as long as the model does."""
    with dynamic_vram(request.param):
        yield checkpoint.load_model(str(write_checkpoint(tmp_path_factory.mktemp("models"))))[0]
        comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def split(model):
    """The model after the node, on a machine with two devices."""
    gc.collect()
    comfy.model_management.cleanup_models()  # core's node stumbles over models that are gone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "get_all_torch_devices",
                      lambda **_: [torch.device("cpu"), SECOND])
        return MultiGPUCFGSplitNode.execute(model, 2).result[0]


def second_of(split):
    clone, = split.get_additional_models_with_key("multigpu")
    return clone


def clip(i2v: bool) -> dict:
    latent = joint(seed=3)
    return {"samples": latent, **({"noise_mask": first_frame_mask(latent)} if i2v else {})}


def run(model, solver="unipc", i2v=False, skip=SKIPPED, seed=1, text=1):
    """'Ovi Sampler' with both prompts, the negative with an audio text of its own."""
    return OviSampler.execute(model, conditioning(7, text), conditioning(5, 2, audio_tokens=4), clip(i2v), seed, 3,
                              solver, 5.0, 4.0, 3.0, skip, 1.0).result[0]["samples"]


@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_two_devices_give_the_clip_of_one(model, split, solver, i2v):
    alone = run(model, solver, i2v)
    with Batches(model) as first, Batches(second_of(split)) as second:
        together = run(split, solver, i2v)
    assert first == second == [1] * 3  # each prompt on a device of its own
    assert_pair_close(together, alone, 1e-5)


@pytest.mark.parametrize("name", ["RescaleCFG", "APG", "several", "object"])
def test_guidance_nodes_give_the_clip_of_one_device(model, split, name):
    alone = run(NODES[name](model))
    assert_pair_close(run(NODES[name](split)), alone, 1e-5)
    assert relative_l2(alone.unbind()[0], run(model).unbind()[0]) > 1e-3


def test_the_second_device_has_a_model_of_its_own(model, split):
    assert second_of(split).model is not model.model and second_of(split).load_device == SECOND
    assert_pair_equal(run(model), run(model))
    assert len(model.get_additional_models_with_key("multigpu")) == 0


@pytest.mark.parametrize("skip", [-1, 0, 2])
def test_the_skipped_layer_is_left_out_on_the_second_device(model, split, skip):
    """Alone with its prompt, the negative pass does not even compute it."""
    blocks, ran = second_of(split).model.diffusion_model.blocks, []
    handles = [block.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    together = run(split, skip=skip)
    for handle in handles:
        handle.remove()
    assert ran == [i for i in range(TINY.blocks) if i != skip] * 3
    assert_pair_close(together, run(model, skip=skip), 1e-5)


def test_runs_after_each_other_keep_their_prompts_and_sizes_apart(model, split):
    """What one run left on either device must not reach the next."""
    for options in ({"text": 1}, {"text": 9}, {"i2v": True, "text": 9}, {"text": 1, "seed": 2}, {"text": 1}):
        assert_pair_close(run(split, **options), run(model, **options), 1e-5)
    assert relative_l2(run(split, text=9).unbind()[0], run(split, text=1).unbind()[0]) > 1e-3  # the prompt matters


def test_neither_device_keeps_anything(split):
    """Texts, rotary tables, latents: after a run as many tensors are alive as before."""
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    run(split)
    before = alive()
    for text in (3, 4):
        run(split, text=text)
    assert alive() == before


def test_a_lora_reaches_both_devices(model, split):
    """Patches put on after the node."""
    changes = {f"diffusion_model.{tower}blocks.{i}.ffn.0.weight": (torch.full((TINY.ffn, TINY.dim), 0.02),)
               for tower in ("", "audio_model.") for i in range(TINY.blocks)}

    def patched(patcher):
        patcher = patcher.clone()
        assert len(patcher.add_patches(changes)) == len(changes)
        patcher.match_multigpu_clones()
        return patcher

    alone = run(patched(model))
    assert_pair_close(run(patched(split)), alone, 1e-5)
    assert relative_l2(alone.unbind()[0], run(model).unbind()[0]) > 1e-3


# --- two fake GPUs ----------------------------------------------------------------------------------------------------

def test_two_gpus_share_the_passes_and_nothing_else(monkeypatch):
    """Core's scheduler on cuda:0 and cuda:1. Mixing their tensors would raise; what crosses is counted."""
    weights = draw_weights()
    latent, mask = joint(seed=3), first_frame_mask(joint(seed=3))
    mask.unbind()[1][:, :, :3] = 0
    prompts = conditioning(4, 1), conditioning(3, 2, audio_tokens=3)

    def guider_of(patcher):
        return make_guider(patcher, *prompts, 4.0, 3.0, SKIPPED)

    conds = prepared(guider_of(load(weights)), latent, mask)
    endless_memory(monkeypatch)
    gpus, made = FakeGpus(), Operations()
    first, second = (gpus.patcher(weights, f"cuda:{i}") for i in range(2))
    guider = guider_of(first)
    out = fake_sample(gpus, guider, latent, conds, "unipc", mask, watch=made,
                      clones={first.load_device: guider.model_patcher, second.load_device: second})
    assert out.device == torch.device("cuda:0")
    assert not any(tensor.device.type == "cpu" for op in made.list for tensor in (*op.inputs, *op.made))
    for step in made.steps():
        kernels = Counter(op.made[0].device.index for op in step if op.name == "apply_rope1")
        assert kernels == {0: 8 * TINY.blocks, 1: 8 * (TINY.blocks - 1)}  # 4 rotations a block and tower
        crossing = [op for op in step if {t.device.index for t in (*op.inputs, *op.made)} == {0, 1}]
        assert {op.name for op in crossing} <= {"_to_copy", "copy_", "empty_like"}
        there, back = ([op.made[0].numel for op in crossing if op.made and op.made[0].device.index == i]
                       for i in (1, 0))
        clip = sum(stream.numel() for stream in latent.unbind())
        masks, numbers = [3, latent.unbind()[1].shape[2]], [1, 1, 1, STEPS + 1]  # noise levels, timestep
        assert sorted(there) == sorted([clip, *[512 * TINY.text] * 2, *masks, *numbers])  # latent and conditioning
        assert back == [clip]
    assert len(made.steps()) == STEPS - 1
