"""What GPUs rely on, shown without one: streamed and partly loaded weights, memory estimates, no leaks."""

import gc
import math

import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_custom_sampler import RandomNoise
from ovi_native.ovi_model.ovi.guider import make_guider
from ovi_native.ovi_model.ovi.model import OviModel
from ovi_native.ovi_model.ovi.supported_models import pass_memory
from ovi_native.ovi_model.sampling import solvers
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, assert_pair_equal
from tiny.fake_gpu import estimate as estimate_memory
from tiny.fake_gpu import run_on_fake_gpu, tiny_patcher
from tiny.inputs import conditioning, first_frame_mask, joint, noise, text
from tiny.models import load, network

GIB = 1 << 30


@pytest.fixture(scope="module")
def weights():
    return draw_weights()


def predict(model: OviModel, **options):
    with torch.no_grad():
        return model([noise(1, 48, 2, 4, 4, seed=1), noise(1, 20, 9, seed=2)], torch.tensor([600.0]), text(6, 3), {},
                     **options)


# --- streaming and partial loading ---------------------------------------------------------------------------------

def test_weights_can_stay_on_the_cpu(monkeypatch):
    """Every weight, bare parameters too, is fetched when it is used and let go after."""
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 0)
    peak, size = run_on_fake_gpu(comfy.ops.manual_cast, (2, 8, 8))
    assert size > 1.5 * GIB and peak < 0.25 * size


def test_layers_that_do_not_fetch_their_weights_fail():
    """The control: the same call without ComfyUI's casting layers mixes devices."""
    with pytest.raises(Exception, match="device"):
        run_on_fake_gpu(comfy.ops.disable_weight_init, (2, 8, 8))


def offloaded(model: OviModel) -> list:
    """Layers with weights that fetch them whenever they run."""
    return [m for m in model.modules() if getattr(m, "comfy_cast_weights", False) and list(m.parameters())]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_partly_loaded_models_compute_the_same(weights, share, monkeypatch):
    full = predict(network(load(weights)))
    patcher = load(weights)
    patcher.patch_model(torch.device("cpu"), lowvram_model_memory=max(1, int(share * patcher.model_size())))
    left_out = offloaded(network(patcher))
    everything = [m for m in network(patcher).modules() if hasattr(m, "comfy_cast_weights") and list(m.parameters())]
    assert patcher.model.model_lowvram
    assert len(left_out) == len(everything) if share == 0 else 0 < len(left_out) < len(everything)

    casts, cast = [], comfy.ops.cast_bias_weight
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda s, *a, **k: casts.append(s) or cast(s, *a, **k))
    for a, b in zip(predict(network(patcher)), full, strict=True):
        assert torch.equal(a, b)
    assert len(casts) == len(left_out) and set(casts) == set(left_out)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_lora_on_a_partly_loaded_model(weights, share):
    """Applied when weights are fetched, or merged before: the same to rounding."""
    lora = {f"diffusion_model.{layer}.{way}.weight": noise(*shape, seed=seed) * 0.1
            for seed, layer in enumerate(("blocks.0.ffn.0", "audio_model.blocks.2.self_attn.v"))
            for way, shape in (("lora_up", (192 if "ffn" in layer else 256, 4)), ("lora_down", (4, 256)))}
    results = []
    for memory in (0, max(1, int(share * 40e6))):
        patcher, _ = comfy.sd.load_lora_for_models(load(weights), None, lora, 1.0, 0)
        patcher.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
        results.append(predict(network(patcher)))
        assert bool(patcher.model.lowvram_patch_counter) == bool(memory)
    assert_pair_close(results[1], results[0], 1e-6)
    with pytest.raises(AssertionError):
        assert_pair_close(results[0], predict(network(load(weights))), 1e-4)


# --- the estimate ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("tokens", "batch"), [((31, 22, 22), 1), ((31, 30, 30), 1), ((61, 30, 30), 1),
                                               ((31, 22, 22), 2)])
def test_the_memory_estimate_covers_the_peak_and_not_much_more(tokens, batch, monkeypatch):
    """15k, 28k and 55k video tokens at the real width, on the fake GPU, against what ComfyUI would keep free."""
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 0)
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)
    peak, _ = run_on_fake_gpu(comfy.ops.manual_cast, tokens, batch)
    patcher, (frames, rows, columns) = tiny_patcher(), tokens
    video, audio = (frames, 2 * rows, 2 * columns), round(frames * 157 / 31)
    estimate = estimate_memory(patcher, video, audio, batch)
    assert peak < estimate < 1.25 * peak, f"estimate {estimate / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB"
    assert math.isclose(estimate, pass_memory(batch * math.prod(tokens)), rel_tol=0.01)  # what the latent's node says
    assert math.isclose(estimate, batch * estimate_memory(patcher, video, audio), rel_tol=1e-6)


# --- leaks and interruptions ----------------------------------------------------------------------------------------

def sample(patcher, callback=None, steps=2):
    latent = joint(2, 2, 2, seed=5)
    guider = make_guider(patcher, conditioning(4, 1), conditioning(3, 2, audio_tokens=3), 4.0, 3.0, 1)
    return guider.sample(RandomNoise.execute(1).result[0].generate_noise({"samples": latent}), latent,
                         solvers.make_sampler("unipc"), solvers.make_sigmas("unipc", steps), callback=callback,
                         denoise_mask=first_frame_mask(latent), disable_pbar=True)


def tensors_alive() -> tuple[int, int]:
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(tensors), sum(x.numel() * x.element_size() for x in tensors)


def test_twenty_runs_leave_nothing_behind(weights):
    patcher = load(weights)
    first = sample(patcher)
    sample(patcher)
    before = tensors_alive()
    for _ in range(20):
        last = sample(patcher)
    del last
    assert tensors_alive() == before
    assert_pair_equal(sample(patcher), first)


def test_an_interrupted_run_stops_at_once_and_leaves_nothing_behind(weights):
    patcher = load(weights)
    expected = sample(patcher)
    steps = []

    def interrupt(step, *_):
        steps.append(step)
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    def interrupted_run():
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(patcher, interrupt, steps=6)

    interrupted_run()
    before = tensors_alive()
    for _ in range(3):
        interrupted_run()
    assert steps == [0, 1] * 4
    assert tensors_alive() == before
    comfy.model_management.throw_exception_if_processing_interrupted()  # the request was consumed
    assert_pair_equal(sample(patcher), expected)
