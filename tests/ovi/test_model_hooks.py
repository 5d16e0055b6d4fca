"""What ComfyUI and other nodes hang on the network, and what compilers make of it."""

from dataclasses import replace

import comfy.model_prefetch
import comfy.patcher_extension
import comfy.quant_ops
import pytest
import torch
import torch._dynamo.testing
from ovi_native.ovi_model.ovi import blocks
from ovi_native.ovi_model.ovi.blocks import FusedBlock, modulate, modulate_in_one_kernel
from support.network_runs import FP32, frame_mask, fused_attention, region_mask, run
from tiny.checkpoint import draw_weights
from tiny.compare import relative_l2
from tiny.inputs import noise, text
from tiny.models import load, network, tiny_model
from tiny.sizes import TINY


@pytest.fixture(scope="module")
def weights():
    return draw_weights()


@pytest.fixture(scope="module")
def model(weights):
    return network(load(weights))


@pytest.fixture(scope="module")
def inputs():
    """video, audio, video text, audio text."""
    return noise(1, 48, 3, 4, 6, seed=1), noise(1, 20, 15, seed=2), text(9, 3), text(5, 4)


def test_block_replacements_get_and_return_the_pair(model, inputs):
    video, audio, *texts = inputs
    seen = []

    def replace_block(args, extra):
        seen.append([x.shape for x in args["img"]])
        out = extra["original_block"](args)
        return {"img": tuple(2 * x for x in out["img"])} if len(seen) > 1 else out

    def options(function, block):
        return {"patches_replace": {"dit": {("double_block", block): function}}}

    base = run(model, video, audio, [600.0], *texts)
    kept = run(model, video, audio, [600.0], *texts, transformer_options=options(replace_block, 1))
    assert seen == [[(1, 18, TINY.dim), (1, 15, TINY.dim)]]
    assert all(torch.equal(a, b) for a, b in zip(kept, base, strict=True))
    doubled = run(model, video, audio, [600.0], *texts, transformer_options=options(replace_block, 1))
    assert all(relative_l2(a, b) > 1e-2 for a, b in zip(doubled, base, strict=True))
    skipped = run(model, video, audio, [600.0], *texts, transformer_options=options(lambda args, _: args, 1))
    layer = run(model, video, audio, [600.0], *texts, skip_layers=[1])
    assert all(torch.equal(a, b) for a, b in zip(skipped, layer, strict=True))


def test_blocks_know_where_they_are(model, inputs):
    video, audio, *texts = inputs
    places = []

    def note(args, extra):
        options = args["transformer_options"]
        places.append((options["block_index"], options["total_blocks"], options["block_type"]))
        return extra["original_block"](args)

    run(model, video, audio, [600.0], *texts, transformer_options={
        "patches_replace": {"dit": {("double_block", i): note for i in range(TINY.blocks)}}})
    assert places == [(i, TINY.blocks, "double") for i in range(TINY.blocks)]


def test_diffusion_model_wrappers_see_the_call(model, inputs):
    video, audio, *texts = inputs

    def wrapper(executor, x, timestep, context, transformer_options, **kwargs):
        return [-out for out in executor(x, timestep, context, transformer_options, **kwargs)]

    options = {"wrappers": {comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL: {"test": [wrapper]}}}
    for a, b in zip(run(model, video, audio, [600.0], *texts, transformer_options=options),
                    run(model, video, audio, [600.0], *texts), strict=True):
        assert torch.equal(a, -b)


def test_prefetching_streams_both_towers_block_by_block(model, inputs, monkeypatch):
    """ComfyUI fetches the weights of whatever `modules()` of the next queue entry yields."""
    video, audio, *texts = inputs
    queues, popped = [], []

    def make_queue(queue, _device, _options):
        queues.append(list(queue))
        return [None, *queue, None]

    def pop(queue, _device, module):
        popped.append(module)
        queue.pop(0)

    monkeypatch.setattr(comfy.model_prefetch, "make_prefetch_queue", make_queue)
    monkeypatch.setattr(comfy.model_prefetch, "prefetch_queue_pop", pop)
    run(model, video, audio, [600.0], *texts, skip_layers=[1])
    pairs = queues[0]
    assert popped == [*pairs, None]  # also past a skipped block
    for i, pair in enumerate(pairs):
        assert isinstance(pair, FusedBlock)
        assert set(pair.modules()) == {*model.blocks[i].modules(), *model.audio_model.blocks[i].modules()}


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_the_kernel_for_gpus_modulates_the_same(frames):
    """Through comfy-kitchen's own dispatch, which computes on the CPU what its kernel does on a GPU."""
    norm = torch.nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
    x, shift, scale = noise(2, 6, 16, seed=1), noise(2, frames, 16, seed=2), noise(2, frames, 16, seed=3)
    tokens = [each.repeat_interleave(6 // frames, dim=1) for each in (shift, scale)]
    expected = norm(x) * (1 + tokens[1]) + tokens[0]
    for function in (modulate, modulate_in_one_kernel):
        torch.testing.assert_close(function(norm, x, shift, scale), expected)


@pytest.mark.parametrize(("backends", "expected"), [
    ({"cuda": (True, False), "eager": (True, False)}, {"cuda"}),
    ({"cuda": (True, True), "triton": (True, True), "eager": (True, False)}, set()),  # CUDA 12
    ({"cuda": (False, False), "hip": (True, False), "eager": (True, False)}, {"hip"}),
    ({"cuda": (True, True), "triton": (True, False), "eager": (True, False)}, {"triton"}),
])
def test_the_kernel_is_used_where_it_is_compiled(backends, expected, monkeypatch):
    """comfy-kitchen's eager form is slower than ours. Here, on a CPU, core has switched off all but that."""
    assert blocks.compiled_backends() == set() and blocks.HAS_KERNEL is False
    monkeypatch.setattr(comfy.quant_ops.ck, "list_backends", lambda: {
        name: {"available": available, "disabled": disabled, "capabilities": ["adaln", "apply_rope"]}
        for name, (available, disabled) in backends.items()})
    assert blocks.compiled_backends() == expected
    monkeypatch.delattr(comfy.quant_ops, "ck")
    assert blocks.compiled_backends() == set()


@torch.no_grad()
def test_nothing_is_written_into_what_an_attention_function_returned(model, inputs):
    """One that records what it returned, as packs for attention maps do."""
    kept = []

    def record(function, *args, **kwargs):
        out = function(*args, **kwargs)
        kept.append((out, out.clone()))
        return out

    run(model, *inputs[:2], [600.0], *inputs[2:], transformer_options={"optimized_attention_override": record})
    run(model, inputs[0], None, [600.0], inputs[2], transformer_options={"optimized_attention_override": record})
    assert len(kept) == TINY.blocks * (6 + 2)
    assert all(torch.equal(held, copy) for held, copy in kept)


@pytest.mark.parametrize("patched", [False, True])
def test_a_skipped_row_is_not_computed(model, inputs, patched):
    """Only what patches the blocks still gets the whole batch; the result is the same."""
    video, audio, *texts = (torch.cat([x, x + 0.5, x - 0.5]) for x in inputs)
    sizes = {}
    handles = [block.ffn.register_forward_hook(lambda _m, args, _o, i=i: sizes.__setitem__(i, len(args[0])))
               for i, block in enumerate(model.blocks)]
    options = {"patches": {"attn1_patch": [lambda args: args["x"]]}} if patched else {}
    found = run(model, video, audio, [600.0] * 3, *texts, transformer_options=options, skip_layers=[-1, 1, -1])
    for handle in handles:
        handle.remove()
    assert sizes == {i: 3 if patched or i != 1 else 2 for i in range(len(model.blocks))}
    for row, layer in enumerate((-1, 1, -1)):
        single = run(model, video[row:row + 1], audio[row:row + 1], [600.0],
                     *(text[row:row + 1] for text in texts), skip_layers=[layer])
        for a, b in zip(found, single, strict=True):
            assert relative_l2(a[row:row + 1], b) < FP32


@pytest.mark.parametrize("mask", [frame_mask(3).repeat(2, 1, 1, 1, 1), region_mask(2)])
def test_the_whole_network_compiles_to_one_graph(inputs, mask):
    """Fullgraph, with a mask and a skipped row in the batch; other times and noise reuse the compiled code."""
    model = network(tiny_model(sizes=replace(TINY, blocks=2)))
    video, audio, *texts = (torch.cat([x, x + 0.5]) for x in inputs)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for t in (900.0, 437.0, 11.0):
        options = fused_attention()
        arguments = {"shown_timestep": torch.tensor(int(t)), "denoise_mask": mask, "skip_layers": [-1, 1]}
        found = run(compiled, video * t, audio, [t, t], *texts, transformer_options=dict(options), **arguments)
        expected = run(model, video * t, audio, [t, t], *texts, transformer_options=dict(options), **arguments)
        for a, b in zip(found, expected, strict=True):
            assert relative_l2(a, b) < FP32
    assert counter.frame_count == 1
    torch._dynamo.reset()
