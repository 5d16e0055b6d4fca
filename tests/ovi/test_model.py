"""The fused network: against the oracle on random shapes, and what ComfyUI relies on."""

import json
import random
from dataclasses import replace

import comfy.model_prefetch
import comfy.patcher_extension
import comfy.quant_ops
import pytest
import torch
import torch._dynamo.testing
from comfy.ldm.modules.attention import attention_pytorch
from ovi_native.ovi_model.ovi import blocks
from ovi_native.ovi_model.ovi.blocks import FusedBlock, modulate, modulate_in_one_kernel
from ovi_native.ovi_model.ovi.model import AUDIO_ROPE_SCALE, audio_clock
from ovi_native.ovi_model.ovi.towers import fit_text
from safetensors.torch import load_file
from support import oracle
from tiny.checkpoint import draw_weights
from tiny.compare import relative_l2
from tiny.inputs import noise, text
from tiny.models import load, network, tiny_model
from tiny.sizes import TINY, Sizes
from torch.utils._python_dispatch import TorchDispatchMode

FP32 = 5e-6
BF16 = 2e-2
CASES = 16


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


def frame_mask(frames: int) -> torch.Tensor:
    mask = torch.ones(1, 1, frames, 1, 1)
    mask[:, :, 0] = 0
    return mask


def fused_attention() -> dict:
    """transformer_options for PyTorch's attention, which ComfyUI uses on GPUs; on CPU it has one of its own."""
    return {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}


@torch.no_grad()
def run(model, video, audio, t, video_text, audio_text=None, transformer_options=None, **options):
    return model([video, audio], torch.as_tensor(t, dtype=torch.float32).reshape(-1), video_text,
                 {} if transformer_options is None else transformer_options, audio_context=audio_text, **options)


# --- the oracle is the reference, and the network is the oracle -------------------------------------------------------

def test_the_oracle_is_the_reference(golden):
    """Every forward case; the float64 ones to rounding, the float32 ones to float32 rounding."""
    folder = golden / "fusion"
    weights, inputs = load_file(folder / "weights.safetensors"), load_file(folder / "inputs.safetensors")
    exact, truth = load_file(folder / "outputs_fp64_subset.safetensors"), load_file(folder / "outputs_fp32.safetensors")
    for name, case in json.loads((folder / "config.json").read_text())["cases"].items():
        only = case.get("only")
        video, audio = oracle.forward(
            weights, None if only == "audio" else inputs["vid"], None if only == "video" else inputs["audio"].T,
            float(inputs[case["t"]]), inputs["vid_context"], inputs["audio_context"],
            case.get("first_frame_is_clean", False), case.get("slg_layer") or -1)
        for stream, out in (("vid", video), ("audio", None if audio is None else audio.T)):
            key = f"{name}.{stream}"
            assert (out is None) == (key not in truth)
            if out is not None:
                assert relative_l2(out, truth[key]) < 2e-6
            if key in exact:
                assert relative_l2(out, exact[key]) < 1e-12


def test_the_oracle_rotates_like_the_reference(golden):
    data = load_file(golden / "rope.safetensors")
    x = data["apply_audio.in"][0].double().flatten(1)
    assert relative_l2(oracle.rotate(x, oracle.audio_angles(len(x))), data["apply_audio.out"][0].flatten(1)) < 1e-12
    x = data["apply_video.in"][0].double().flatten(1)
    angles = oracle.video_angles(*data["apply_video.grid"].tolist())
    assert relative_l2(oracle.rotate(x, angles), data["apply_video.out"][0].flatten(1)) < 1e-12
    table = torch.stack([oracle.sinusoids(float(t), 256) for t in data["timestep_embedding.t"]])
    assert relative_l2(table, data["timestep_embedding.out"]) < 1e-12


def random_case(seed: int) -> dict:
    """A model and inputs of random shapes, odd heights and widths included."""
    r = random.Random(seed)
    sizes = Sizes(heads=r.randint(1, 3), blocks=r.randint(1, 3), ffn=r.choice([64, 96]), text=r.choice([16, 40]))
    only = r.choice([None, None, None, "video", "audio"])
    return {
        "sizes": sizes, "only": only, "clean_first_frame": r.random() < 0.5 and only != "audio",
        "skip": [r.choice([-1, -1, *range(sizes.blocks)]) for _ in range(3)], "batch": r.choice([1, 2, 3]),
        "t": [r.choice([r.randint(0, 1000), r.randint(0, 64000) / 64]) for _ in range(3)],  # exact in float32
        "video": (r.randint(1, 4), r.randint(1, 7), r.randint(1, 7)), "audio": r.randint(1, 20),
        "texts": [(r.randint(1, 40), r.randint(1, 40)) for _ in range(3)],
    }


@pytest.mark.parametrize("seed", range(CASES))
def test_random_shapes_and_batches_agree_with_the_oracle(seed):
    case = random_case(seed)
    sizes, batch, only = case["sizes"], case["batch"], case["only"]
    weights = draw_weights(sizes, seed)
    video = None if only == "audio" else noise(batch, 48, *case["video"], seed=seed)
    audio = None if only == "video" else noise(batch, 20, case["audio"], seed=seed + 50)
    texts = [[noise(n, sizes.text, seed=seed + 100 * i + j) for i, n in enumerate(case["texts"][j])]
             for j in range(batch)]
    contexts = [torch.cat([fit_text(row[i][None], 40) for row in texts]) for i in range(2)]

    found = run(network(load(weights)), video, audio, case["t"][:batch], *contexts,
                denoise_mask=frame_mask(case["video"][0]) if case["clean_first_frame"] else None,
                skip_layers=case["skip"][:batch])
    for row in range(batch):
        truth = oracle.forward(
            weights, None if video is None else video[row], None if audio is None else audio[row], case["t"][row],
            *texts[row], clean_first_frame=case["clean_first_frame"], skip_layer=case["skip"][row])
        for out, expected in zip(found, truth, strict=True):
            assert (out is None) == (expected is None)
            if out is not None:
                assert relative_l2(out[row], expected) < FP32, case


def test_the_random_cases_reach_every_feature():
    cases = [random_case(seed) for seed in range(CASES)]
    assert {case["only"] for case in cases} == {None, "video", "audio"}
    assert any(case["video"][1] % 2 and case["video"][2] % 2 and not case["only"] for case in cases)
    assert any(case["batch"] > 1 and len(set(case["skip"][:case["batch"]])) > 1 and not case["only"] for case in cases)
    assert any(case["clean_first_frame"] and not case["only"] for case in cases)


def test_bf16_is_as_close_as_the_reference_in_bf16(weights, inputs):
    found = run(network(load(weights, torch.bfloat16)), *(x.bfloat16() for x in inputs[:2]), [700.0],
                *(x.bfloat16() for x in inputs[2:]))
    truth = oracle.forward(weights, inputs[0][0], inputs[1][0], 700.0, inputs[2][0], inputs[3][0])
    for out, expected in zip(found, truth, strict=True):
        assert out.dtype == torch.bfloat16
        assert relative_l2(out[0], expected) < BF16


# --- streams, batches, text -------------------------------------------------------------------------------------------

def test_a_batch_is_its_rows(model):
    video, audio, prompt = noise(3, 48, 2, 4, 4, seed=5), noise(3, 20, 8, seed=6), noise(3, 7, TINY.text, seed=7)
    times, skips = [900.0, 500.0, 0.0], [-1, 1, 2]
    together = run(model, video, audio, times, prompt, skip_layers=skips)
    for row in range(3):
        alone = run(model, video[row:row + 1], audio[row:row + 1], times[row:row + 1], prompt[row:row + 1],
                    skip_layers=skips[row:row + 1])
        for a, b in zip(together, alone, strict=True):
            assert relative_l2(a[row:row + 1], b) < FP32


def test_each_stream_listens_to_the_other_and_to_its_own_text(model, inputs):
    video, audio, video_text, audio_text = inputs
    base = run(model, video, audio, [600.0], video_text, audio_text)
    for changed in (run(model, video, audio + 1, [600.0], video_text, audio_text),
                    run(model, video + 1, audio, [600.0], video_text, audio_text),
                    run(model, video, audio, [600.0], video_text + 1, audio_text),
                    run(model, video, audio, [600.0], video_text, audio_text + 1)):
        assert all(relative_l2(a, b) > 1e-4 for a, b in zip(changed, base, strict=True))


def test_without_a_text_of_its_own_the_audio_reads_the_video_text(model, inputs):
    video, audio, prompt, _ = inputs
    for a, b in zip(run(model, video, audio, [600.0], prompt), run(model, video, audio, [600.0], prompt, prompt),
                    strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("only", ["video", "audio"])
def test_one_stream_alone_ignores_skipped_layers(model, inputs, only):
    video, audio, *texts = inputs
    pair = (video, None) if only == "video" else (None, audio)
    plain, skipped = run(model, *pair, [600.0], *texts), run(model, *pair, [600.0], *texts, skip_layers=[1])
    index = 0 if only == "video" else 1
    assert plain[1 - index] is None and skipped[1 - index] is None
    assert torch.equal(plain[index], skipped[index])


def test_text_beyond_512_tokens_is_cut(model, inputs):
    video, audio, *_ = inputs
    long = text(600, 8)
    for a, b in zip(run(model, video, audio, [300.0], long), run(model, video, audio, [300.0], long[:, :512]),
                    strict=True):
        assert torch.equal(a, b)


def test_given_audio_has_timestep_0_on_its_latents_only(model, inputs):
    """A mask over part of the audio gives those latents timestep 0 and leaves video times alone."""
    video, audio, *texts = inputs
    mask = torch.ones(1, 1, audio.shape[2])
    plain, all_sampled = (run(model, video, audio, [600.0], *texts, audio_denoise_mask=m) for m in (None, mask))
    assert all(relative_l2(a, b) < FP32 for a, b in zip(all_sampled, plain, strict=True))
    all_given = run(model, None, audio, [600.0], *texts, audio_denoise_mask=mask * 0)[1]
    assert relative_l2(all_given, run(model, None, audio, [0.0], *texts)[1]) < FP32
    mask[:, :, :4] = 0
    part = run(model, None, audio, [600.0], *texts, audio_denoise_mask=mask)[1]
    assert relative_l2(part, all_given) > 1e-3
    assert relative_l2(part, run(model, None, audio, [600.0], *texts)[1]) > 1e-3


def region_mask(batch: int = 1) -> torch.Tensor:
    """[B, 1, 3, 4, 6]: frame 0 given; of frame 1 the left third; of frame 2 nothing, but a soft edge on the right."""
    mask = torch.ones(batch, 1, 3, 4, 6)
    mask[:, :, 0] = 0
    mask[:, :, 1, :, :2] = 0
    mask[:, :, 2, :, 4:] = 0.75
    mask[1:, :, 1, 2:] = 1  # another region in further rows
    return mask


@pytest.mark.parametrize("skips", [None, [-1, 1]])
def test_a_mask_inside_a_frame_gives_each_token_its_timestep(model, inputs, skips):
    """The same as times spelled out for every token."""
    video, audio, *texts = (torch.cat([x, x + 0.5]) for x in inputs)
    mask = region_mask(2)
    tokens = mask[:, :, :, ::2, ::2].reshape(2, 1, -1, 1, 1)
    found, expected, mean = (run(model, video, audio, [600.0, 437.0], *texts, denoise_mask=m, skip_layers=skips)
                             for m in (mask, tokens, mask.mean(dim=(3, 4), keepdim=True)))
    for a, b, c in zip(found, expected, mean, strict=True):
        assert relative_l2(a, b) < FP32
        assert relative_l2(a, c) > 1e-4


def test_a_mask_inside_a_frame_takes_little_memory(model):
    """Modulation for its levels, not for every token."""
    video, audio, prompt = noise(1, 48, 2, 48, 48, seed=1), noise(1, 20, 10, seed=2), text(4, 1)
    mask = torch.ones(1, 1, 2, 48, 48)
    mask[..., :24] = 0
    with Largest() as largest:
        run(model, video, audio, [600.0], prompt, transformer_options=fused_attention(), denoise_mask=mask)
    assert largest.elements <= max(2 * 24 * 24 * TINY.dim, 65 * 6 * TINY.dim)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (4, 5), (1, 2)])
def test_masks_of_odd_sizes_fit_the_tokens(model, rows, columns):
    video, mask = noise(1, 48, 2, rows, columns, seed=3), torch.ones(1, 1, 2, rows, columns)
    mask[..., 0] = 0
    out, = (run(model, video, None, [400.0], text(3, 1), denoise_mask=mask)[0],)
    assert out.shape == video.shape and torch.isfinite(out).all()


# --- memory and precision -----------------------------------------------------------------------------------------

class Largest(TorchDispatchMode):
    """Notes the most elements any operation puts into new memory."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if torch.is_tensor(x)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_modulation_is_built_per_frame_not_per_token(model):
    video, audio, prompt = noise(1, 48, 2, 24, 24, seed=1), noise(1, 20, 10, seed=2), text(4, 1)
    tokens = 2 * 12 * 12
    table = tokens * 6 * TINY.dim
    with Largest() as per_frame:
        found = run(model, video, audio, [600.0], prompt, transformer_options=fused_attention(),
                    denoise_mask=frame_mask(2))
    assert per_frame.elements < table / 2
    with Largest() as per_token:  # the control: the same times spelled out for every token
        spelled_out = run(model, video, audio, [600.0], prompt, transformer_options=fused_attention(),
                          denoise_mask=frame_mask(2).repeat_interleave(tokens // 2, dim=2))
    assert per_token.elements >= table
    for a, b in zip(found, spelled_out, strict=True):
        assert relative_l2(a, b) < FP32


def test_audio_positions_stay_float32_in_a_bf16_model(weights, inputs):
    model = network(load(weights, torch.bfloat16))
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[1].freqs))
    run(model, *(x.bfloat16() for x in inputs[:2]), [700.0], inputs[2].bfloat16())
    handle.remove()
    length = inputs[1].shape[2]
    assert seen[0].dtype == torch.float32 and seen[0].shape == (1, length, 1, 64, 2, 2)
    table = model.audio_model.rope_table(314, 0.0, AUDIO_ROPE_SCALE, "cpu")[0, :, 0]
    assert torch.equal(seen[0][0, :, 0], table[:length])
    angles = oracle.audio_angles(314)
    assert (table[:, :, 0, 0] - angles.cos()).abs().max() < 1e-5
    assert (table[:, :, 1, 0] - angles.sin()).abs().max() < 1e-5


def test_both_streams_share_one_clock():
    """31 video latents last as long as 157 audio latents: rotary positions agree at the far end."""
    assert 157 * AUDIO_ROPE_SCALE == pytest.approx(31, abs=0.2)


def test_stretching_the_clock_moves_both_streams():
    """Core's 'ScaleROPE' acts on time through `rope_options`."""
    assert audio_clock({}) == (0.0, AUDIO_ROPE_SCALE)
    start, step = audio_clock({"rope_options": {"scale_t": 0.5, "shift_t": 2.0}})
    assert (start, step) == (2.0, AUDIO_ROPE_SCALE / 2)


def test_odd_sizes_keep_their_shape_and_wrap_around(model):
    video, audio, prompt = noise(1, 48, 2, 3, 5, seed=3), noise(1, 20, 4, seed=4), text(3, 1)
    even = torch.cat([video, video[:, :, :, :1]], dim=3)
    even = torch.cat([even, even[..., :1]], dim=4)
    odd_out, even_out = (run(model, v, audio, [400.0], prompt)[0] for v in (video, even))
    assert odd_out.shape == video.shape
    assert torch.equal(odd_out, even_out[:, :, :, :3, :5])


# --- ComfyUI's hooks -------------------------------------------------------------------------------------------------

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
