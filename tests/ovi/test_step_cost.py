"""What a step costs, in counts: graphs, waits, products, bytes, kernels, casts. What slows the step fails here.

No seconds, which belong to a machine. Beside every number that is pinned stands the formula or the list of reasons.
What one layer or one of core's functions comes to differs between versions of PyTorch, and is counted on the spot.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo.testing
from comfy.context_windows import ContextFuseMethods, ContextSchedules
from comfy.ldm.flux.math import rope
from comfy.ldm.modules.attention import attention_pytorch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import RandomNoise
from comfy_extras.nodes_torch_compile import TorchCompileModel
from ovi_native.ovi_model.ovi import guider
from ovi_native.ovi_model.sampling import solvers
from support.fake_sampling import STEPS, FakeGpus, endless_memory, prepared
from support.fake_sampling import sample as fake_sample
from support.step_counters import Operation, Operations, Waits, casts, largest
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close
from tiny.inputs import conditioning, first_frame_mask, joint, noise, text
from tiny.models import load, network
from tiny.sizes import Sizes, tensor_shapes
from torch._dynamo.utils import counters

SIZES = Sizes(blocks=2)
FULL = Sizes(heads=24, blocks=30, ffn=14336, text=4096)
TEXT_TOKENS = 512


@pytest.fixture(scope="module")
def weights():
    return draw_weights(SIZES)


def on_pytorch_attention(patcher):
    """The attention of GPUs: one operation, and one that compiles; core's own for CPUs is neither."""
    patcher.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda _, *args, **options: attention_pytorch(*args, **options))
    return patcher


def clip(kind: str, **sizes):
    """(latent, mask): text to video ("t2v"), or from a given first frame and start of the sound ("i2v")."""
    latent = joint(**{"frames": 3, "height": 4, "width": 4, "seed": 3, **sizes})
    if kind == "t2v":
        return latent, None
    mask = first_frame_mask(latent)
    mask.unbind()[1][:, :, :3] = 0
    return latent, mask


def make_guider(patcher):
    """Both prompts in one batch, one scale a stream, a skipped layer: all there is."""
    return guider.make_guider(patcher, conditioning(4, 1), conditioning(3, 2, audio_tokens=3), 4.0, 3.0, 1)


def sample(patcher, solver="unipc", kind="t2v", steps=4, callback=None, **sizes):
    latent, mask = clip(kind, **sizes)
    noise = RandomNoise.execute(1).result[0].generate_noise({"samples": latent})
    return make_guider(patcher).sample(noise, latent, solvers.make_sampler(solver), solvers.make_sigmas(solver, steps),
                                       denoise_mask=mask, callback=callback, disable_pbar=True)


# --- graphs -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def compiler():
    """A backend that runs graphs as they are and counts them."""
    torch._dynamo.reset()
    counters.clear()
    yield torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()


def test_core_s_compile_node_makes_a_graph_for_all_steps(weights, compiler):
    """One for the solvers that show whole timesteps, one for those that do not; the node ignores the options' changes.

    A graph of one that is used for the other would sample wrongly or not at all.
    """
    compiled, = TorchCompileModel.execute(on_pytorch_attention(load(weights)), compiler).result
    plain = on_pytorch_attention(load(weights))
    for solver, graphs in (("unipc", 1), ("dpm++", 1), ("euler", 2), ("unipc", 2), ("euler", 2)):
        assert_pair_close(sample(compiled, solver), sample(plain, solver), 1e-6)
        assert compiler.frame_count == graphs and not counters["graph_break"], solver


def test_a_compiled_model_follows_its_windows(weights, compiler):
    """Each context window has its own place in time; the graph must not keep the first one's for all.

    Windows cut as many audio latents as are played, one more or less: a graph for the first length, one for the rest.
    """
    def windowed(patcher):
        return ContextWindowsManualNode.execute(
            on_pytorch_attention(patcher), 4, 2, ContextSchedules.STATIC_STANDARD, 1, False,
            ContextFuseMethods.PYRAMID, 2, False, causal_window_fix=False).result[0]

    compiled, = TorchCompileModel.execute(windowed(load(weights)), compiler).result
    fresh = windowed(load(weights))
    found, expected = (sample(patcher, steps=2, frames=8, height=2, width=2) for patcher in (compiled, fresh))
    assert_pair_close(found, expected, 1e-6)
    assert compiler.frame_count <= 2 and not counters["graph_break"]


def test_blocks_compiled_one_by_one_share_two_graphs(compiler):
    """As other programs' nodes compile: the first block's graph, and one for all the others, whatever their number."""
    weights = draw_weights(Sizes(blocks=5))
    compiled, plain = (on_pytorch_attention(load(weights)) for _ in range(2))
    set_torch_compile_wrapper(compiled, compiler, fullgraph=True,
                              keys=[f"diffusion_model.blocks.{i}" for i in range(5)])
    for solver in ("unipc", "euler"):
        assert_pair_close(sample(compiled, solver, "i2v"), sample(plain, solver, "i2v"), 1e-6)
        assert compiler.frame_count <= 2 and not counters["graph_break"]


# --- waiting for the device -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_no_step_waits_for_the_device(weights, solver, kind):
    """Neither ours nor core's; before the first step, core asks for three numbers and we for the ones listed;
    after the last, we for one."""
    patcher, steps = load(weights), []
    with Waits() as waits:
        sample(patcher, solver, kind, callback=lambda *_: steps.append(len(waits.list)))
    assert steps == [steps[0]] * 4
    assert waits.list[steps[0]:] == ["tolist in packed.py:not_finite"]  # of the finished clip
    ours = {"unipc": {"tolist in solvers.py:sample_unipc": 1}, "dpm++": {"tolist in solvers.py:sample_dpmpp_2m": 1},
            "euler": {}}[solver]
    checks = {"tolist in solvers.py:check_sigmas": 1, "bool in solvers.py:check_start": 1}
    masks = {"bool in model_base.py:mask_conds": 4} if kind == "i2v" else {}  # two streams, two prompts
    cores = {"float in samplers.py:max_denoise": 2, "bool in samplers.py:inner_sample": 1}
    assert Counter(waits.list[:steps[0]]) == Counter(ours) + Counter(checks) + Counter(masks) + Counter(cores)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_no_step_moves_anything_between_host_and_device(weights, solver, monkeypatch):
    """Steps on a fake GPU: nothing is made on the CPU, and nothing is copied from or to it."""
    latent, mask = clip("i2v")
    conds = prepared(make_guider(on_pytorch_attention(load(weights))), latent, mask)
    endless_memory(monkeypatch)
    gpus, made = FakeGpus(), Operations()
    out = fake_sample(gpus, make_guider(gpus.patcher(weights, "cuda:0")), latent, conds, solver, mask, watch=made)
    assert out.device.type == "cuda" and len(made.list) > 100 * STEPS
    crossing = [op for op in made.list if any(t.device.type == "cpu" for t in (*op.inputs, *op.made))]
    assert not crossing


# --- products ---------------------------------------------------------------------------------------------------------

def block_macs(sizes: Sizes, own: int, other: int) -> int:
    """Multiply-adds of one tower's half of a block."""
    d = sizes.dim
    self_attention = own * 4 * d * d + 2 * own * own * d  # query, key, value, output; scores and sums
    cross_attention = own * 2 * d * d + 2 * own * (TEXT_TOKENS + other) * d  # query, output; text and the other stream
    read = (TEXT_TOKENS + other) * 2 * d * d  # keys and values
    return self_attention + cross_attention + read + own * 2 * d * sizes.ffn


def pass_macs(sizes: Sizes, video: int, audio: int, timesteps: int = 2, skipped: int = 0) -> int:
    """Multiply-adds of one row's pass through both towers; timesteps: those of the video and those of the audio."""
    d, hidden = sizes.dim, tensor_shapes(sizes)["audio_model.patch_embedding.2.w1.weight"][0]
    embedding = video * 4 * 48 * d + audio * 7 * (20 * d + 3 * d * hidden)
    time = timesteps * (sizes.frequencies * d + d * d + d * 6 * d)
    text = 2 * TEXT_TOKENS * (sizes.text * d + d * d)
    heads = video * d * 4 * 48 + audio * d * 20
    blocks = (sizes.blocks - skipped) * (block_macs(sizes, video, audio) + block_macs(sizes, audio, video))
    return embedding + time + text + heads + blocks


def text_share(sizes: Sizes, video: int, audio: int) -> float:
    """Share of a pass that depends on the text alone, and so is the same in every step."""
    d = sizes.dim
    text = 2 * TEXT_TOKENS * (sizes.text * d + d * d + sizes.blocks * 2 * d * d)
    return text / pass_macs(sizes, video, audio)


def test_the_formula_gives_the_real_model_s_cost():
    """704x704, 121 frames: 236 TFLOP a pass and 1.2 for the text, as worked out without it."""
    assert 2 * pass_macs(FULL, 31 * 22 * 22, 157) == pytest.approx(237.2e12, rel=0.005)


def test_the_text_is_not_worth_keeping():
    """Why its keys and values are made anew in each pass: half a percent, against guards for all that may change it."""
    assert text_share(FULL, 31 * 22 * 22, 157) == pytest.approx(0.0051, abs=1e-4)
    assert text_share(FULL, 61 * 30 * 30, 314) < 0.001


@pytest.mark.parametrize(("frames", "height", "width", "audio"), [(3, 4, 4, 15), (2, 6, 10, 40)])
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_step_multiplies_what_the_formula_says(weights, kind, frames, height, width, audio):
    """Two sizes, which tell tokens from tokens squared. The layer that the negative prompt skips is not computed for
    it, although both prompts share a batch."""
    patcher, made = on_pytorch_attention(load(weights)), Operations()
    with made:
        sample(patcher, "unipc", kind, callback=lambda *_: made.mark(), frames=frames, height=height, width=width,
               audio=audio)
    video = frames * height * width // 4
    timesteps = 2 if kind == "t2v" else frames + audio  # one a stream, or one a frame and one a latent
    expected = sum(pass_macs(SIZES, video, audio, timesteps, skipped) for skipped in (0, 1))
    for step in made.steps():
        assert sum(op.macs for op in step) == expected
        # per block and tower 12 layers, 3 attentions; besides 5 convolutions, 2 heads, and of both towers 3 layers of
        # the time and 2 of the text
        assert sum(op.macs > 0 for op in step) == 2 * SIZES.blocks * 15 + 17
    assert sum(op.macs for op in made.list) == 4 * expected


# --- bytes, kernels, casts --------------------------------------------------------------------------------------------

WIDE = {"frames": 8, "height": 32, "width": 32, "audio": 40}
TOKENS, FRAMES, FFN = 8 * 16 * 16, 8, 1152


def steady_step(blocks: int, monkeypatch) -> list[Operation]:
    """What a GPU is asked to do for one step in bf16 of a run with a first frame, once it is under way."""
    sizes = Sizes(blocks=blocks, ffn=FFN)
    weights, (latent, mask) = draw_weights(sizes), clip("i2v", **WIDE)
    conds = prepared(make_guider(on_pytorch_attention(load(weights))), latent, mask)
    gpus, made = FakeGpus(), Operations()
    with monkeypatch.context() as patch:
        patch.setattr("ovi_native.ovi_model.ovi.blocks.HAS_KERNEL", True)  # as where PyTorch's CUDA is 13 or newer
        endless_memory(patch)
        fake_sample(gpus, make_guider(gpus.patcher(weights, "cuda:0")), latent, conds, "unipc", mask, watch=made)
    return made.steps()[-1]


@pytest.fixture(scope="module")
def steps():
    """A steady step of models with 2 and with 3 blocks."""
    with pytest.MonkeyPatch.context() as patch:
        return steady_step(2, patch), steady_step(3, patch)


@pytest.fixture(scope="module")
def block(steps):
    """The operations of one block of both towers."""
    return list((Counter(steps[1]) - Counter(steps[0])).elements())


@dataclass(frozen=True)
class Price:
    """What one call asks of a GPU: how many kernels, and new memory in video residuals [2, tokens, dim] in bf16."""

    launches: int
    memory: float

    @classmethod
    def of(cls, operations: list[Operation]) -> Price:
        made = sum(tensor.nbytes for op in operations for tensor in op.made)
        return cls(sum(op.is_launch for op in operations), made / (2 * TOKENS * SIZES.dim * 2))


@pytest.fixture(scope="module")
def layers():
    """Prices of single layers with this PyTorch, in which a norm may be one kernel or six."""
    gpus = FakeGpus()
    block = network(gpus.patcher(draw_weights(Sizes(blocks=1)), "cuda:0")).blocks[0]
    x, prices = gpus.tensor(torch.empty(2, TOKENS, SIZES.dim, dtype=torch.bfloat16), "cuda:0"), {}
    for name, layer in {"linear": block.self_attn.q, "rms": block.self_attn.norm_q, "norm": block.norm3}.items():
        made = Operations()
        with gpus.mode, torch.no_grad(), made:
            layer(x)
        prices[name] = Price.of(made.list)
    return prices


def test_modulation_is_made_for_frames_not_for_tokens(steps):
    """Six vectors a timestep: one a video frame, and one a latent of a sound given in part."""
    made = [tensor.shape for op in steps[0] for tensor in op.made]
    sixes = {shape for shape in made if 6 in shape or 6 * SIZES.dim in shape}
    counts = {math.prod(shape[:-2] if 6 in shape else shape[:-1]) for shape in sixes}
    assert counts == {rows * count for rows in (1, 2) for count in (FRAMES, WIDE["audio"])}  # 1 row: the skipped block
    assert largest(steps[0]) == 2 * TOKENS * FFN  # and nothing is larger than the feed-forward's hidden layer


def test_a_block_allocates_what_it_has_to(block, layers):
    """Slack for less than one video residual more."""
    linear, rms, norm = (layers[name].memory for name in ("linear", "rms", "norm"))
    modulated = rotated = attention = summed = 1
    self_attention = modulated + 3 * linear + 2 * (rms + rotated) + attention + linear  # q, k, v; q, k; output
    cross_attention = norm + linear + rms + rotated + 2 * attention + summed + linear  # to text and to the other
    read_by_the_other = norm + 2 * linear + rms + rotated  # k, v; k
    feed_forward = modulated + FFN / SIZES.dim + linear  # the hidden layer, activated in place
    own = self_attention + cross_attention + read_by_the_other + feed_forward
    text = 2 * (2 * linear + rms) * TEXT_TOKENS / TOKENS  # k, v; k; in both towers
    expected = own * (1 + WIDE["audio"] / TOKENS) + text
    assert expected == pytest.approx(Price.of(block).memory, abs=0.5)


def test_a_block_launches_few_kernels(block, layers):
    """For each tower, beside 3 attentions, which in these tests only allocate."""
    modulated, rotations, gates, activation = 2, 4, 2, 1
    sums = 3  # of the table of modulation, of attentions, into the residual
    norms = 5 * layers["rms"].launches + 2 * layers["norm"].launches
    expected = 12 * layers["linear"].launches + norms + modulated + rotations + gates + activation + sums
    assert Price.of(block).launches == 2 * expected, Counter(op.name for op in block)


def test_a_step_changes_floating_dtypes_where_it_must(steps, block):
    """In bf16. Neither a block nor a solver does."""
    assert not casts(block)
    assert casts(steps[0]) == Counter({
        "model_base.py:_apply_model: fp32 -> bf16": 1,  # core: the latent, which is sampled in fp32
        "model_base.py:_apply_model: bf16 -> fp32": 1,  # core: the result
        "model_management.py:cast_to: fp32 -> bf16": 4,  # core: conditionings (two texts, two masks)
        "math.py:rope: fp64 -> fp32": 4,  # core: three axes of the video, one of the sound
        "model.py:embed: bf16 -> fp32": 1,  # the video is embedded in fp32, as upstream
        "model.py:embed: fp32 -> bf16": 1,
        "towers.py:timestep_sinusoids: fp32 -> fp64": 2,  # upstream's precision, for a few numbers
        "towers.py:timestep_sinusoids: fp64 -> fp32": 2,
        "towers.py:embed_time: fp32 -> bf16": 2,
    })


def around(step: list[Operation]) -> list[Operation]:
    """What runs for a step beside the network: solver, guidance, masks, rotary tables and core's own."""
    inside = ("model.py", "towers.py", "blocks.py", "ops.py", "math.py:apply_rope1")
    return [op for op in step if op.is_launch and not op.where.startswith(inside)]


def test_our_arithmetic_around_the_network_is_that_of_the_formulas(steps):
    """On latents. Counted are Python's operators, each of which is one kernel with any PyTorch."""
    predictor = 3 + 4  # x and the newest estimate by their factors; the difference to the one before by two, over r
    corrector = 3 + 8  # the same from one step back; the differences to the estimate before and to the new one
    timestep, cfg_of_the_sound = 1, 3
    ours = [op for op in around(steps[0]) if op.where.startswith(("solvers.py", "stream_guidance.py", "model_base.py"))]
    arithmetic = [op for op in ours if op.name.strip("_") in ("add", "sub", "rsub", "mul", "div")]
    assert len(arithmetic) == predictor + corrector + timestep + cfg_of_the_sound, Counter(op.where for op in ours)


def test_what_runs_around_the_network_is_small(steps, block):
    """Little more than in one block, of which there are 30; on latents, where a block works on residuals."""
    gpus, table = FakeGpus(), Operations()
    positions = gpus.tensor(torch.empty(1, TOKENS), "cuda:0")
    with gpus.mode, table:
        rope(positions, 44, 10000.0)
    tables = [op for op in around(steps[0]) if op.where == "math.py:rope"]  # three axes of the video, one of the sound
    assert len(tables) == 4 * sum(op.is_launch for op in table.list)
    assert len(around(steps[0])) == len(around(steps[1]))
    assert len(around(steps[0])) - len(tables) < 1.25 * Price.of(block).launches, Counter(
        op.where for op in around(steps[0]))


@pytest.mark.parametrize("only", [None, "video", "audio"])
def test_residuals_lie_token_by_token_in_every_block(weights, only):
    """The embedding leaves them channel by channel. Each norm would copy them, and each sum mix the two orders."""
    model, seen = network(load(weights)), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.extend(stream.x for stream in args[:2] if stream))
    latents = [None if only == "audio" else noise(2, 48, 3, 4, 6), None if only == "video" else noise(2, 20, 15)]
    with torch.no_grad():
        model(latents, torch.full((2,), 500.0), text(5, 1).expand(2, -1, -1), {})
    assert len(seen) == SIZES.blocks * (2 if only is None else 1) and all(x.is_contiguous() for x in seen)
