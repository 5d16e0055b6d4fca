"""What a sampling computes once: texts as keys and values, rotary tables; and when none of it may be kept."""

from collections import Counter

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
import torch._dynamo.testing
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_hooks import ConditioningSetProperties, CreateHookLora
from helpers import (
    TINY,
    assert_pair_close,
    assert_pair_equal,
    conditioning,
    draw_weights,
    first_frame_mask,
    joint,
    load,
    network,
    noise,
)
from ovi_native.ovi_model import guidance, model, solvers
from ovi_native.ovi_model.constants import SamplingConstants
from safetensors.torch import save_file

BLOCKS = TINY.blocks


@pytest.fixture(scope="module")
def weights():
    return draw_weights()


def sample(patcher, positive=None, negative=None, steps=3, callback=None, clips=1, solver="unipc"):
    latent = joint(2, 2, 2, seed=5, batch=clips)
    guider = guidance.make_guider(patcher, positive or conditioning(4, 1),
                                  negative or conditioning(3, 2, audio_tokens=3), 4.0, 3.0, 1)
    noises = joint(2, 2, 2, seed=6, batch=clips)
    return guider.sample(noises, latent, solvers.make_sampler(solver), solvers.make_sigmas(solver, steps),
                         callback=callback, denoise_mask=first_frame_mask(latent), disable_pbar=True)


def forgetful(patcher, monkeypatch):
    """The same model, keeping nothing."""
    monkeypatch.setattr(SamplingConstants, "keep", lambda *_: False)
    return patcher


def count_calls(patcher) -> Counter:
    """Count the calls of every layer that only the text passes through, and of the rotary tables."""
    calls, towers = Counter(), {"video": network(patcher), "audio": network(patcher).audio_model}
    for name, tower in towers.items():
        tower.text_embedding.register_forward_hook(lambda *_, n=name: calls.update([f"{n} text"]))
        for block in tower.blocks:
            for layer in ("k", "v", "norm_k"):
                getattr(block.cross_attn, layer).register_forward_hook(
                    lambda *_, n=name, part=layer: calls.update([f"{n} {part}"]))
        tower.rope_embedder.register_forward_hook(lambda *_, n=name: calls.update([f"{n} rope"]))
    return calls


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("clips", [1, 2])
def test_each_text_is_projected_once_whatever_the_number_of_steps(weights, clips, solver, monkeypatch):
    patcher = load(weights)
    calls = count_calls(patcher)
    found = sample(patcher, steps=5, clips=clips, solver=solver)
    for tower in ("video", "audio"):
        assert calls[f"{tower} text"] == 2
        assert calls[f"{tower} k"] == calls[f"{tower} v"] == calls[f"{tower} norm_k"] == 2 * BLOCKS
    assert calls["video rope"] == 1
    calls.clear()
    assert_pair_close(sample(forgetful(patcher, monkeypatch), steps=5, clips=clips, solver=solver), found, 1e-5)
    assert calls["video k"] >= 5 * (BLOCKS - 1) and calls["video rope"] >= 5  # the control


def test_each_text_of_a_batch_is_kept_for_itself(weights, monkeypatch):
    """The second is much longer than the first, so a length or a row taken from the other one shows."""
    patcher = load(weights)
    short, (text, options) = conditioning(4, 1)[0][0], conditioning(300, 7)[0]
    rows = torch.cat([torch.nn.functional.pad(short, (0, 0, 0, 296)), text])
    found = sample(patcher, positive=[[rows, options]], clips=2)
    swapped = sample(patcher, positive=[[rows.flip(0), options]], clips=2)
    expected = sample(forgetful(patcher, monkeypatch), positive=[[rows, options]], clips=2)
    assert_pair_close(found, expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_pair_close(swapped, expected, 1e-4)


def test_the_next_run_reads_its_own_text_and_weights(weights, monkeypatch):
    patcher = load(weights)
    runs = [(patcher, 1), (patcher, 9)]
    lora = {f"diffusion_model.blocks.0.cross_attn.k.{part}.weight": noise(*shape, seed=seed)
            for seed, (part, shape) in enumerate((("lora_up", (256, 4)), ("lora_down", (4, 256))))}
    runs.append((comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0], 1))
    found = [sample(p, conditioning(4, seed)) for p, seed in runs]
    monkeypatch.setattr(SamplingConstants, "keep", lambda *_: False)
    for (p, seed), result in zip(runs, found, strict=True):
        assert_pair_close(result, sample(p, conditioning(4, seed)), 1e-5)
    for other in found[1:]:
        with pytest.raises(AssertionError):
            assert_pair_close(found[0], other, 1e-4)


def test_a_wrapper_that_divides_the_batch_gets_each_row_its_own_text(weights):
    """It divides tensors; what stands for the texts stays whole, and no longer belongs to the rows."""
    def row_by_row(executor, x, t, concat, text, control, options, **conds):
        return torch.cat([executor(x[i:i + 1], t[i:i + 1], concat, text[i:i + 1], control, options, **{
            key: value[i:i + 1] if torch.is_tensor(value) else value for key, value in conds.items()})
            for i in range(len(x))])

    def run(patcher):
        guider = guidance.make_guider(patcher, conditioning(4, 1), conditioning(3, 2, audio_tokens=3), 4.0, 3.0)
        return guider.sample(joint(2, 2, 2, seed=6), joint(2, 2, 2, seed=5), solvers.make_sampler("euler"),
                             solvers.make_sigmas("euler", 2), disable_pbar=True)

    whole = load(weights)
    divided = whole.clone()
    divided.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "row by row", row_by_row)
    assert_pair_close(run(divided), run(whole), 1e-5)


def test_a_wrapper_may_change_the_texts_from_step_to_step(weights, monkeypatch):
    """As nodes do that anneal the conditioning with noise."""
    def fade_in(apply_model, args):
        args["c"]["c_crossattn"] = args["c"]["c_crossattn"] * (1 - args["timestep"].max())
        return apply_model(args["input"], args["timestep"], **args["c"])

    plain = load(weights)
    faded = plain.clone()
    faded.set_model_unet_function_wrapper(fade_in)
    found = sample(faded)
    with pytest.raises(AssertionError):
        assert_pair_close(found, sample(plain), 1e-3)
    assert_pair_close(found, sample(forgetful(faded, monkeypatch)), 1e-5)


@pytest.mark.parametrize("end", ["finished", "failed", "interrupted"])
def test_nothing_is_kept_after_a_run(weights, end):
    patcher = load(weights)
    kept = []

    def callback(step, *_):
        kept.append((len(patcher.model.constants.texts), patcher.model.constants.rope[1] is not None))
        if step == 1 and end == "failed":
            raise RuntimeError("out of luck")
        if step == 1 and end == "interrupted":
            comfy.model_management.interrupt_current_processing()

    raised = {"finished": (), "failed": RuntimeError,
              "interrupted": comfy.model_management.InterruptProcessingException}[end]
    try:
        sample(patcher, callback=callback, steps=4)
        assert end == "finished"
    except raised:
        pass
    assert kept[:2] == [(2, True)] * 2
    assert patcher.model.constants.texts == {} and patcher.model.constants.rope == (None, None)


def test_texts_are_not_kept_where_memory_is_short(weights, monkeypatch):
    """The latent comes first; then each text needs its bytes. Rows of one batch are kept all or not at all."""
    patcher = load(weights)
    expected = sample(patcher)
    kept = []

    def run(free):
        kept.clear()
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_: free)
        return sample(patcher, callback=lambda *_: kept.append(len(patcher.model.constants.texts)))

    base = patcher.model
    size = 2 * BLOCKS * (128 + 128) * 256 * 4
    both_passes = base.memory_required([2, 1, sum(x[0].numel() for x in joint(2, 2, 2).unbind())]) + 2 * size
    assert_pair_close(run(both_passes - 1), expected, 1e-5)
    assert set(kept) == {0}
    assert_pair_close(run(both_passes + 1), expected, 1e-5)
    assert set(kept) == {2}


def test_the_estimate_counts_the_texts(weights):
    """Keys and values for each block, 128 rows at a time, at least one of them padding if there is any."""
    base = load(weights).model
    plain, row = base.memory_required([1, 1, 100]), 2 * BLOCKS * 256 * 4
    for tokens, rows in ((4, 128), (127, 128), (128, 256), (383, 384), (384, 512), (512, 512), (600, 512)):
        shapes = base.extra_conds_shapes(cross_attn=noise(1, tokens, 64), ovi_audio_text=noise(2, 4, 64))
        assert shapes == {"encoded_text": [2 * (rows + 128) * row]}
        assert base.memory_required([1, 1, 100], {"encoded_text": [shapes["encoded_text"]] * 2}) == (
            plain + 4 * (rows + 128) * row)
    assert base.extra_conds_shapes() == {}
    assert base.extra_conds_shapes(cross_attn=torch.zeros(1, 300, 64)) == {"encoded_text": [2 * 128 * row]}


@pytest.mark.parametrize("tokens", [1, 127, 128, 130, 511, 512])
@pytest.mark.parametrize("padded", [False, True])
def test_padding_is_kept_once(weights, tokens, padded, monkeypatch):
    """A text reads the same whether its padding is kept row by row or one row stands for all."""
    text, options = conditioning(tokens, 1)[0]
    if padded:  # as core's own text node hands it over
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - tokens))
    patcher, kept = load(weights), []
    found = sample(patcher, positive=[[text, options]],
                   callback=lambda *_: kept.extend(patcher.model.constants.texts.items()))
    for name, encoded in kept:
        if name.video_tokens == tokens:
            assert len(encoded.video) == BLOCKS
            assert encoded.video[0][0].shape == (1, min(512, (tokens // 128 + 1) * 128), 256)
    assert {name.video_tokens for name, _ in kept} == {tokens, 3}
    assert_pair_close(found, sample(forgetful(patcher, monkeypatch), positive=[[text, options]]), 1e-5)


def test_texts_under_changing_weights_are_not_kept(weights, tmp_path, monkeypatch):
    """A LoRA hook changes weights from pass to pass, and may from step to step."""
    lora = {f"diffusion_model.blocks.0.cross_attn.k.{part}.weight": noise(*shape, seed=seed)
            for seed, (part, shape) in enumerate((("lora_up", (256, 4)), ("lora_down", (4, 256))))}
    save_file(lora, tmp_path / "hook.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    hooks, = CreateHookLora().create_hook("hook.safetensors", 1.0, 0.0)
    hooked, = ConditioningSetProperties().set_properties(conditioning(4, 1), 1.0, "default", hooks=hooks)
    patcher, kept = load(weights), []
    found = sample(patcher, positive=hooked, callback=lambda *_: kept.append(len(patcher.model.constants.texts)))
    assert set(kept) == {1}  # the negative's, which has no hook
    assert_pair_close(found, sample(forgetful(patcher, monkeypatch), positive=hooked), 1e-5)


def test_nothing_is_kept_outside_a_sampling_or_while_training(weights):
    base = load(weights).model
    assert not base.constants.keep(base)
    patcher = load(weights)
    patcher.pre_run()
    with torch.enable_grad():
        assert not patcher.model.constants.keep(patcher.model)
    with torch.no_grad():
        assert patcher.model.constants.keep(patcher.model)
    patcher.cleanup()


def test_layers_that_are_done_with_are_not_streamed(weights, monkeypatch):
    """The prefetcher skips the text's projections once their results are at hand: a tenth of a block's weights."""
    patcher, asked = load(weights), []
    monkeypatch.setattr(model.FusedPair, "__post_init__", lambda pair: asked.append(pair), raising=False)
    sample(patcher)
    net = network(patcher)
    for i, pair in enumerate(asked[:BLOCKS]):
        left_out = {*net.blocks[i].modules(), *net.audio_model.blocks[i].modules()} - set(pair.modules())
        assert left_out == {layer for tower in (net, net.audio_model)
                            for attention in [tower.blocks[i].cross_attn]
                            for layer in (attention.k, attention.v, attention.norm_k)}


def test_a_compiled_network_keeps_them_too(weights):
    patcher, compiled = load(weights), load(weights)
    for p in (patcher, compiled):  # PyTorch's attention, as on GPUs; what ComfyUI uses on a CPU does not compile
        p.model_options["transformer_options"]["optimized_attention_override"] = (
            lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs))
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    set_torch_compile_wrapper(model=compiled, backend=counter, fullgraph=True)
    calls = count_calls(compiled)
    found = sample(compiled, steps=4)
    assert calls["video k"] == 2 * BLOCKS
    assert counter.frame_count == 1
    assert_pair_close(found, sample(patcher, steps=4), 1e-5)
    assert_pair_equal(sample(compiled, steps=4), found)
    assert counter.frame_count == 1
    torch._dynamo.reset()
