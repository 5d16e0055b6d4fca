"""'Ovi Attention', 'Ovi Guidance Range' and 'Ovi Fast'; the step cache has tests of its own."""

import sys
import types

import comfy.ldm.modules.attention as core
import nodes
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    CFGGuider,
    DisableNoise,
    FlipSigmas,
    KSamplerSelect,
    RandomNoise,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple
from ovi_native.nodes.sampling import OviAudioGuidance, OviSampler
from ovi_native.nodes.speed import PRESETS, OviAttention, OviFast, OviGuidanceRange, OviStepCache
from ovi_native.ovi_model.sampling import attention_backend, solvers
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, assert_pair_equal
from tiny.inputs import conditioning, joint, noise
from tiny.models import Batches, load, network, plain_wan
from tiny.sizes import Sizes

CONDS = conditioning(7, 1), conditioning(5, 2, audio_tokens=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights():
    return draw_weights(Sizes(blocks=2))


@pytest.fixture(scope="module")
def model(weights):
    return load(weights)


@pytest.fixture
def flash3(monkeypatch):
    """A stand-in for FlashAttention 3, which no CPU runs: PyTorch's attention behind its interface, tuple included."""
    def flash_attn_func(q, k, v):
        assert q.shape[2:] == (2, 128) and q.dtype in attention_backend.HALF
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        calls.append(q.shape[1])
        return out.transpose(1, 2).contiguous(), None

    calls, package = [], types.ModuleType("flash_attn_interface")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    attention_backend.flash3_operator.cache_clear()
    yield calls
    attention_backend.flash3_operator.cache_clear()


def sample(model, steps=4, **options):
    arguments = {"video_guidance": 4.0, "audio_guidance": 3.0, "solver": "euler"} | options
    latent = {"samples": joint(2, 2, 2, seed=1)}
    return OviSampler.execute(model, *CONDS, latent, 5, steps, shift=5.0, skip_layer=-1, denoise=1.0,
                              **arguments).result[0]["samples"]


def patched(node, model, *values):
    return node.execute(model, *values).result[0]


# --- attention --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["pytorch", "sub-quadratic"])
def test_a_backend_is_used_for_every_attention_and_is_exact(model, monkeypatch, name):
    registered, calls = attention_backend.BACKENDS[name].registered, []
    function = core.get_attention_function(registered)
    monkeypatch.setitem(core.REGISTERED_ATTENTION_FUNCTIONS, registered,
                        lambda *args, **options: (calls.append(1), function(*args, **options))[1])
    chosen = patched(OviAttention, model, name)
    calls.clear()
    assert_pair_close(sample(chosen, steps=1), sample(model, steps=1), 1e-5)
    assert len(calls) == 2 * 6  # two blocks: in each tower its own, its text, the other stream


def test_auto_takes_an_earlier_choice_back(model):
    chosen = patched(OviAttention, model, "pytorch")
    assert attention_backend.OVERRIDE in chosen.model_options["transformer_options"]
    assert attention_backend.OVERRIDE not in patched(OviAttention, chosen, "auto").model_options["transformer_options"]
    assert attention_backend.OVERRIDE in chosen.model_options["transformer_options"]


@pytest.mark.parametrize("name, install", [
    ("flash 2", "pip install flash-attn"), ("flash 3", "'hopper'"), ("sage", "pip install sageattention"),
    ("sage 3", "'sageattention3_blackwell'"), ("xformers", "pip install xformers")])
def test_what_is_not_installed_is_refused_with_what_to_install(model, name, install):
    if attention_backend.find(name) is not None:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(RuntimeError) as error:
        OviAttention.execute(model, name)
    assert f"{attention_backend.BACKENDS[name].title} is not installed" in str(error.value)
    assert install in str(error.value) and "choose 'auto'" in str(error.value)


def test_a_backend_that_core_would_silently_replace_is_refused(monkeypatch):
    """Core's own function, as where flash-attn imports and the GPU is too old: a warning a call, PyTorch's result."""
    if core.FLASH_ATTENTION_IS_AVAILABLE:
        pytest.skip("flash-attn is installed here")
    monkeypatch.setitem(core.REGISTERED_ATTENTION_FUNCTIONS, "flash", core.attention_flash)
    with pytest.raises(RuntimeError, match=r"FlashAttention 2 is installed but does not work on cpu in bfloat16: "
                                           r"Flash Attention failed.*needs an NVIDIA GPU.*choose 'auto'"):
        attention_backend.check("flash 2", CPU, torch.bfloat16)


@pytest.mark.parametrize("compute, reason", [
    (torch.zeros_like, "its result is 100% off"),
    (lambda q: torch.full_like(q, float("nan")), "its result is nan% off"),
    (lambda q: q @ q, "RuntimeError: Expected size")], ids=["zeros", "nan", "error"])
def test_a_backend_that_computes_nonsense_is_refused(monkeypatch, compute, reason):
    monkeypatch.setitem(core.REGISTERED_ATTENTION_FUNCTIONS, "sage", lambda q, *_, **__: compute(q))
    with pytest.raises(RuntimeError, match=f"does not work on cpu in bfloat16: {reason}"):
        attention_backend.check("sage", CPU, torch.bfloat16)
    assert not attention_backend.works("sage", CPU, torch.bfloat16)


@pytest.mark.usefixtures("flash3")
def test_a_backend_without_fp32_is_refused_for_an_fp32_model(model):
    with pytest.raises(RuntimeError, match=r"FlashAttention 3 computes in bf16 or fp16, but this model computes in "
                                           r"float32 on cpu\. Choose weight_dtype 'bf16'"):
        OviAttention.execute(model, "flash 3")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="Choose one of: auto, pytorch, flash 2, flash 3"):
        attention_backend.check("flash 9", CPU, torch.bfloat16)


def test_flash_attention_3_in_half_precision_alone(weights, flash3):
    half = load(weights, torch.bfloat16)
    assert_pair_close(sample(patched(OviAttention, half, "flash 3"), steps=1),
                      sample(patched(OviAttention, half, "pytorch"), steps=1), 1e-2)
    assert flash3[0] == 1152 and len(flash3) == 1 + 2 * 6
    full = attention_backend.set_attention(load(weights), "flash 3")  # 'ModelComputeDtype' after the node
    flash3.clear()
    assert_pair_close(sample(full, steps=1), sample(patched(OviAttention, load(weights), "pytorch"), steps=1), 1e-6)
    assert not flash3


def test_flash_attention_3_leaves_masks_to_pytorch(flash3):
    q, k, v = (noise(1, 6, 256, seed=i, dtype=torch.bfloat16) for i in range(3))
    mask = torch.tensor([True, True, False, False, True, True]).expand(1, 1, 6, 6)
    found = attention_backend.find("flash 3")(q, k, v, 2, mask=mask)
    assert torch.equal(found, core.attention_pytorch(q, k, v, 2, mask=mask)) and not flash3


@pytest.mark.slow
@pytest.mark.usefixtures("flash3")
def test_a_compiled_model_is_one_graph_with_everything_on(weights):
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    plain, compiled = load(weights, torch.bfloat16), load(weights, torch.bfloat16)
    set_torch_compile_wrapper(compiled, backend=counter, fullgraph=True)
    results = []
    for each in (plain, compiled):
        each = patched(OviAttention, each, "flash 3")
        each = patched(OviStepCache, each, 3.0, 3.0, 0.0, 1.0)
        results.append(sample(patched(OviGuidanceRange, each, 0.0, 0.99), steps=7))
    torch._dynamo.reset()
    assert_pair_close(*results, 1e-6)
    assert counter.frame_count <= 2  # one for two conditionings in a batch, one for the unguided step


# --- guidance range ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("start, end, expected", [
    (0.0, 1.0, [2, 2, 2, 2]), (0.0, 0.5, [2, 2, 1, 1]), (0.25, 0.75, [1, 2, 2, 1]), (0.9, 1.0, [1, 1, 1, 1])])
def test_the_negative_runs_in_the_range_alone(model, start, end, expected):
    with Batches(model) as passes:
        found = sample(patched(OviGuidanceRange, model, start, end))
    assert passes == expected
    if expected == [2] * 4:
        assert_pair_equal(found, sample(model))


def test_outside_the_range_a_step_is_unguided(model):
    """Bit-equal to two samplings of half the steps each, the second without a negative."""
    sampler, latent = KSamplerSelect.execute("euler").result[0], {"samples": joint(2, 2, 2)}
    sigmas = solvers.make_sigmas("euler", 6)

    def half(guider, noise, sigmas, latent):
        return SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).result[0]

    seeded, none = RandomNoise.execute(4).result[0], DisableNoise.execute().result[0]
    first = half(CFGGuider.execute(model, *CONDS, 4.0).result[0], seeded, sigmas[:4], latent)
    expected = half(BasicGuider.execute(model, CONDS[0]).result[0], none, sigmas[3:], first)["samples"]
    ranged = patched(OviGuidanceRange, OviAudioGuidance.execute(model, 4.0).result[0], 0.0, 0.5)
    found = half(CFGGuider.execute(ranged, *CONDS, 4.0).result[0], seeded, sigmas, latent)["samples"]
    assert_pair_close(found, expected, 1e-5)


def test_no_negative_to_leave_out(model):
    """Scale 1 and a guider without a negative run as ever."""
    ranged = patched(OviGuidanceRange, model, 0.0, 0.5)
    latent, seeded = {"samples": joint(2, 2, 2)}, RandomNoise.execute(4).result[0]
    sampler, sigmas = KSamplerSelect.execute("euler").result[0], solvers.make_sigmas("euler", 4)
    for make in (lambda m: BasicGuider.execute(m, CONDS[0]), lambda m: CFGGuider.execute(m, *CONDS, 1.0)):
        with Batches(model) as passes:
            found, expected = (SamplerCustomAdvanced.execute(seeded, make(m).result[0], sampler, sigmas, latent)
                               .result[0]["samples"] for m in (ranged, model))
        assert passes == [1] * 8
        assert_pair_equal(found, expected)


def test_ksampler_and_a_partial_schedule(model):
    """The share is one of the steps that are run."""
    with Batches(model) as passes:
        nodes.KSampler().sample(patched(OviGuidanceRange, model, 0.0, 0.5), 5, 4, 4.0, "euler", "simple", *CONDS,
                                {"samples": joint(2, 2, 2, seed=1)}, 0.4)
    assert passes == [2, 2, 1, 1]


def test_a_schedule_turned_round(model):
    """'FlipSigmas', which takes a clip back to noise: the share is one of the steps in their order."""
    sampler, latent = KSamplerSelect.execute("euler").result[0], {"samples": joint(2, 2, 2, seed=1)}
    sigmas, = FlipSigmas.execute(solvers.make_sigmas("euler", 4)).result
    guider, = CFGGuider.execute(patched(OviGuidanceRange, model, 0.0, 0.5), *CONDS, 4.0).result
    with Batches(model) as passes, pytest.raises(RuntimeError, match="FlipSigmas"):  # core divides by 1 - 1 at its end
        SamplerCustomAdvanced.execute(DisableNoise.execute().result[0], guider, sampler, sigmas, latent)
    assert passes == [2, 2, 1, 1]


def test_a_function_of_another_node_still_runs_in_the_range(model):
    simple = SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, double_layers="1").result[0]
    with Batches(model) as passes:
        found = sample(patched(OviGuidanceRange, simple, 0.0, 0.5))
    assert passes == [1, 1, 1, 1, 1, 1]  # it runs the two conditionings one after the other
    assert_pair_equal(sample(patched(OviGuidanceRange, simple, 0.0, 1.0)), sample(simple))
    assert not torch.equal(found.unbind()[0], sample(patched(OviGuidanceRange, model, 0.0, 0.5)).unbind()[0])


def test_cores_timestep_range_on_the_negative_is_something_else(model):
    """Where no negative is active core takes zeros for it: scale times the positive. The help page says so."""
    early, = nodes.ConditioningSetTimestepRange().set_range(CONDS[1], 0.0, 0.5)
    estimates = []

    def note(args):
        estimates.append((args["denoised"], args["cond_denoised"]))
        return args["denoised"]

    noted = model.clone()
    noted.set_model_sampler_post_cfg_function(note)
    nodes.KSampler().sample(noted, 5, 4, 4.0, "euler", "simple", CONDS[0], early, {"samples": joint(2, 2, 2, seed=1)})
    guided, positive = estimates[-1]
    assert torch.allclose(guided, 4 * positive)
    estimates.clear()
    nodes.KSampler().sample(patched(OviGuidanceRange, noted, 0.0, 0.5), 5, 4, 4.0, "euler", "simple", *CONDS,
                            {"samples": joint(2, 2, 2, seed=1)})
    guided, positive = estimates[-1]
    assert torch.equal(guided, positive)


# --- all of them ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_is_the_step_cache_on_the_best_backend(weights, flash3, preset):
    model, cache = load(weights, torch.bfloat16), PRESETS[preset].cache
    for tower in (network(model), network(model).audio_model):
        tower.time_embedding[2].weight.data *= 0.01  # so that steps resemble each other, as trained ones do
    fast = OviFast.execute(model, preset)
    assert fast.ui.as_dict()["text"][0].startswith("Attention: flash 3\nStep cache: thresholds ")
    flash3.clear()
    with Batches(model) as passes:
        found = sample(fast.result[0], steps=16)
    assert len(flash3) == len(passes) * 2 * 6
    by_hand = patched(OviStepCache, patched(OviAttention, model, "flash 3"), cache.video_threshold,
                      cache.audio_threshold, cache.start, cache.end)
    with Batches(model) as expected:
        assert_pair_equal(found, sample(by_hand, steps=16))
    assert passes == expected and len(passes) < 16


def test_the_preset_leaves_attention_alone_where_no_faster_backend_works(model):
    chosen = patched(OviAttention, model, "sub-quadratic")
    fast = OviFast.execute(chosen, "balanced")
    assert fast.ui.as_dict()["text"][0].startswith("Attention: not changed\n")
    key = attention_backend.OVERRIDE
    assert (fast.result[0].model_options["transformer_options"][key]
            is chosen.model_options["transformer_options"][key])


@pytest.mark.parametrize("node, values", [
    (OviAttention, ["auto"]), (OviStepCache, [0.1, 0.1, 0.0, 1.0]), (OviGuidanceRange, [0.0, 0.5]),
    (OviFast, ["fast"])])
def test_another_model_is_refused(node, values):
    with pytest.raises(ValueError, match="needs an Ovi model"):
        node.execute(plain_wan(), *values)


@pytest.mark.parametrize("node, values", [(OviStepCache, [0.1, 0.1, 0.5, 0.5]), (OviGuidanceRange, [0.6, 0.5])])
def test_an_empty_range_is_refused(model, node, values):
    with pytest.raises(ValueError, match="start_percent must be below end_percent"):
        node.execute(model, *values)


def test_no_node_changes_its_input(model):
    before = sample(model)
    for node, values in ((OviAttention, ["pytorch"]), (OviStepCache, [3.0, 3.0, 0.0, 1.0]),
                         (OviGuidanceRange, [0.0, 0.5]), (OviFast, ["fast"])):
        node.execute(model, *values)
    assert_pair_equal(sample(model), before)
