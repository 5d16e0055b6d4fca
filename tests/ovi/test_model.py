"""The fused network: against the oracle on random shapes, and what ComfyUI relies on."""

import json
import random

import pytest
import torch
import torch._dynamo.testing
from ovi_native.ovi_model.ovi.model import AUDIO_ROPE_SCALE, audio_clock
from ovi_native.ovi_model.ovi.towers import fit_text
from safetensors.torch import load_file
from support import oracle
from support.network_runs import FP32, frame_mask, fused_attention, region_mask, run
from tiny.checkpoint import draw_weights
from tiny.compare import relative_l2
from tiny.inputs import noise, text
from tiny.models import load, network
from tiny.sizes import TINY, Sizes
from torch.utils._python_dispatch import TorchDispatchMode

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
