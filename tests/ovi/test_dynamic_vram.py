"""Models that ComfyUI loads dynamically, as on every default NVIDIA installation: see `support.loading_state`."""

import collections
import contextlib

import comfy.model_management
import comfy.model_prefetch
import comfy.ops
import comfy.pinned_memory
import pytest
import torch
from ovi_native.ovi_model.files import quantise
from ovi_native.ovi_model.ovi import checkpoint
from support.loading_state import DynamicOnCpu, dynamic_vram, pretend_cuda
from support.lora_hooks import lora, sample, with_hooks
from tiny.compare import assert_pair_close, assert_pair_equal
from tiny.inputs import conditioning
from tiny.models import network, tiny_model, write_checkpoint
from tiny.sizes import Sizes

NAME = "model_960x960.safetensors"
SMALL = Sizes(heads=1, blocks=2)
META = torch.device("meta")


@pytest.mark.parametrize(("stored", "wanted", "computing"), [
    (torch.bfloat16, None, torch.bfloat16), (torch.float32, None, torch.bfloat16),
    (torch.float16, None, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, "int8", torch.bfloat16), (torch.bfloat16, "fp8_scaled", torch.bfloat16),
    (torch.bfloat16, "nvfp4", torch.bfloat16)])
def test_loading_for_a_gpu(tmp_path, monkeypatch, stored, wanted, computing):
    """Every parameter is there, in the file's dtype; core casts it to the model's as it moves it."""
    path = write_checkpoint(tmp_path, NAME, SMALL, dtype=stored)
    monkeypatch.setattr(quantise, "quantising_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(quantise, "check_runs", lambda *_: None)
    with dynamic_vram(), pretend_cuda():
        patcher, report = checkpoint.load_model(str(path), wanted)
    assert patcher.is_dynamic() and report.variant == "960x960_5s" and report.blocks == 2
    model = network(patcher)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(layer.weight is not None for layer in model.modules() if isinstance(layer, comfy.ops.CastWeightBiasOp)
               and not isinstance(layer, torch.nn.LayerNorm) and hasattr(layer, "weight"))
    assert patcher.model.get_dtype_inference() == computing


@pytest.fixture
def static():
    """The same weights in a model of its own memory, which is what the dynamic one is held against."""
    return tiny_model(sizes=SMALL)


@pytest.fixture
def dynamic(static, tmp_path):  # noqa: ARG001 (the static one is made before DynamicVRAM is on)
    """A model in its file that computes on the CPU."""
    path = write_checkpoint(tmp_path, NAME, SMALL, dtype=torch.float32)
    with dynamic_vram(patcher=DynamicOnCpu):
        patcher = checkpoint.load_model(str(path), torch.float32)[0]
        assert patcher.is_dynamic()
        yield patcher
        comfy.model_management.unload_all_models()


def test_computes_what_a_static_model_does(dynamic, static):
    assert not static.is_dynamic()
    truth = sample(static, conditioning(7, 1))
    assert_pair_equal(sample(dynamic, conditioning(7, 1)), truth)
    assert_pair_equal(sample(dynamic, conditioning(7, 1)), truth)


def test_a_lora_comes_and_goes(dynamic, static):
    weights, plain = lora(dynamic), sample(static, conditioning(7, 1))
    patched = comfy.sd.load_lora_for_models(dynamic, None, weights, 1.0, 0.0)[0]
    expected = comfy.sd.load_lora_for_models(static, None, weights, 1.0, 0.0)[0]
    assert_pair_close(sample(patched, conditioning(7, 1)), sample(expected, conditioning(7, 1)), 1e-5)
    assert_pair_equal(sample(dynamic, conditioning(7, 1)), plain)


def test_lora_hooks_get_a_static_copy(dynamic, static):
    positive = with_hooks(conditioning(7, 1), lora(dynamic))
    assert_pair_close(sample(dynamic, positive), sample(static, positive), 1e-5)
    assert_pair_equal(sample(dynamic, conditioning(7, 1)), sample(static, conditioning(7, 1)))


# --- the forward pass with core's prefetching: structure, no numbers --------------------------------------------------


@contextlib.contextmanager
def faked_transfers(count: collections.Counter):
    """Core's moving of weights to a GPU that is the meta device; counts what is fetched ahead and what alone."""
    management, real = comfy.model_management, comfy.ops.cast_modules_with_vbar

    def cast(modules, *args):
        count.update({"ahead" if len(modules) > 1 else "alone": 1})
        return real(modules, *args)

    with pytest.MonkeyPatch.context() as patch:
        for module in (comfy.ops.comfy_aimdo.model_vbar, comfy.model_prefetch.comfy_aimdo.model_vbar):
            patch.setattr(module, "vbar_fault", lambda _: None)
            patch.setattr(module, "vbar_signature_compare", lambda *_: False)
            patch.setattr(module, "vbar_unpin", lambda _: None)
        for name, value in {"get_offload_stream": None, "sync_stream": None, "device_supports_non_blocking": True,
                            "ensure_pin_registerable": 0, "supports_fp64": False}.items():
            patch.setattr(management, name, lambda *_, value=value, **__: value)
        patch.setattr(management, "NUM_STREAMS", 2)
        patch.setattr(management, "cast_to_gathered", lambda *_, **__: count.update(moved=1))
        patch.setattr(comfy.pinned_memory, "get_pin", lambda *_, **__: None)
        patch.setattr(comfy.pinned_memory, "pin_memory", lambda *_, **__: False)
        patch.setattr(comfy.ops, "cast_modules_with_vbar", cast)
        patch.setattr(comfy.quant_ops.ck, "apply_rope1", lambda x, _: torch.empty_like(x))
        yield


def attach(model) -> int:
    """What `ModelPatcherDynamic.load` leaves on each layer; the rest of the parameters go to the device at once."""
    layers = 0
    for name, layer in model.named_modules():
        if hasattr(layer, "comfy_cast_weights") and getattr(layer, "weight", None) is not None:
            layer._v, layer._v_signature, layer.comfy_cast_weights, layer.seed_key = object(), None, True, name
            layers += 1
            for key in ("weight", "bias"):
                if getattr(layer, key, None) is not None:
                    tensor = getattr(layer, key)
                    tensor._model_dtype = getattr(layer, f"{key}_comfy_model_dtype", None) or tensor.dtype
                setattr(layer, f"{key}_lowvram_function", None)
                setattr(layer, f"{key}_function", [])
        else:
            for key, tensor in layer._parameters.items():
                if tensor is not None:
                    layer._parameters[key] = torch.nn.Parameter(tensor.to(META), requires_grad=False)
    return layers


@pytest.mark.parametrize("skip", [None, [-1, 1], [1, 1]])
def test_the_blocks_are_fetched_ahead(tmp_path, skip):
    """Each block's layers come in one go before it runs, whatever is skipped, and nothing waits when the pass ends."""
    path = write_checkpoint(tmp_path, NAME, Sizes(heads=1, blocks=3), dtype=torch.bfloat16)
    count: collections.Counter = collections.Counter()
    with dynamic_vram(), faked_transfers(count):
        patcher = checkpoint.reload_patcher(str(path), None, torch.bfloat16, None)
        patcher.model.manual_cast_dtype = None
        model = network(patcher)
        place = {"device": META, "dtype": torch.bfloat16}
        streams = [torch.empty(2, 48, 3, 4, 4, **place), torch.empty(2, 20, 15, **place)]
        text = torch.empty(2, 512, 64, **place)
        rope = tuple(table.to(META) for table in model.rope_tables(
            [stream.shape for stream in streams], torch.device("cpu"), {}))
        options = {"prefetch_dynamic_vbars": True,
                   "optimized_attention_override": lambda _, q, *__, **___: torch.empty_like(q)}
        layers = attach(model)
        with torch.inference_mode():
            out = model(streams, torch.full((2,), 500.0, device=META), text, options, audio_context=text, rope=rope,
                        skip_layers=skip)
    assert [stream.shape for stream in out] == [stream.shape for stream in streams]
    assert count["ahead"] == 3 and 0 < count["alone"] < 30 and count["moved"] == layers
    assert not any(hasattr(layer, "_prefetch") for layer in model.modules())
