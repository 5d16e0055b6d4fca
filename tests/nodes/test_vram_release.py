"""After a run, text encoder, model and VAEs are ComfyUI's to move away, and nothing of the pack keeps them alive."""

import gc
import sys
import types
import weakref

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import nodes
import pytest
import torch
from devlib.weights import TINY
from ovi_native.nodes import NODES
from ovi_native.nodes.decode import OviDecode, OviDecodeVideo
from ovi_native.nodes.latents import OviEmptyLatent
from ovi_native.nodes.loaders import OviAudioVAELoader, OviModelLoader, OviTextEncoderLoader
from ovi_native.nodes.prompt import OviPrompt
from ovi_native.nodes.sampling import OviSampler

KINDS = ("diffusion_models", "text_encoders", "vae")
HEAVY = (torch.Tensor, torch.nn.Module, comfy.model_patcher.ModelPatcher, comfy.sd.VAE, comfy.sd.CLIP)


@pytest.fixture
def folders(tiny_models, tmp_path, monkeypatch):
    """ComfyUI's own folders hold the tiny bundle; its temp folder is the test's."""
    for kind in KINDS:
        entry = ([str(tiny_models / kind)], folder_paths.supported_pt_extensions)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, entry)
        monkeypatch.delitem(folder_paths.filename_list_cache, kind, raising=False)
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    comfy.model_management.unload_all_models()
    yield
    comfy.model_management.unload_all_models()
    for kind in KINDS:  # or other tests would be shown the tiny bundle's names
        folder_paths.filename_list_cache.pop(kind, None)


def load() -> dict:
    """The four models, as the loader nodes give them."""
    return {
        "model": OviModelLoader.execute(TINY["model"], "default").args[0],
        "clip": OviTextEncoderLoader.execute(TINY["text_encoder"], "automatic").args[0],
        "vae": nodes.VAELoader().load_vae(TINY["video_vae"])[0],
        "audio_vae": OviAudioVAELoader.execute(TINY["audio_vae"], TINY["vocoder"]).args[0],
    }


def generate(parts: dict) -> list[torch.Tensor]:
    """A clip through the real nodes: both latents, frames and sound."""
    positive, negative, *_ = OviPrompt.execute(parts["clip"], "A robot.", "960x960_5s", "a hum", "blur", "echo").args
    empty = OviEmptyLatent.execute("960x960_5s", "custom", 64, 64, 0.0, 5, 1).args[0]
    latent = OviSampler.execute(parts["model"], positive, negative, empty, 1, 2, "unipc", 5.0, 4.0, 3.0, 1, 1.0).args[0]
    (images,), (audio,), _ = OviDecode.execute(latent, parts["vae"], parts["audio_vae"], 0, 64).args
    OviDecodeVideo.execute(latent, parts["vae"], parts["audio_vae"], 23.0)
    return [*latent["samples"].unbind(), images, audio["waveform"]]


def patchers(parts: dict) -> dict:
    return {name: part if name == "model" else part.patcher for name, part in parts.items()}


def loaded() -> set[str]:
    """Classes of the networks that ComfyUI holds on the device."""
    return {type(entry.model.model).__name__ for entry in comfy.model_management.current_loaded_models}


def names(parts: dict, *which: str) -> set[str]:
    return {type(patchers(parts)[name].model).__name__ for name in which}


@pytest.mark.usefixtures("folders", "either_loading")
def test_every_model_was_loaded_by_the_manager_and_can_be_moved_away():
    parts = load()
    first = generate(parts)
    assert loaded() == names(parts, *parts)
    for name, patcher in patchers(parts).items():
        assert patcher.offload_device == torch.device("cpu"), name
        assert not getattr(parts[name], "disable_offload", False), name
    comfy.model_management.unload_all_models()
    assert not loaded()
    assert all(torch.equal(a, b) for a, b in zip(generate(parts), first, strict=True)), "moving models changed a clip"


@pytest.mark.usefixtures("folders")
def test_text_encoder_and_vaes_make_room_for_the_model():
    """What ComfyUI does when the diffusion model asks for more memory than is free."""
    parts = load()
    generate(parts)
    entries = comfy.model_management.current_loaded_models
    keep = [entry for entry in entries if entry.model is parts["model"] or entry.model.is_clone(parts["model"])]
    assert len(keep) == 1
    gone = comfy.model_management.free_memory(1e30, keep[0].device, keep_loaded=keep)
    assert {type(entry.model.model).__name__ for entry in gone} == names(parts, "clip", "vae", "audio_vae")
    assert loaded() == names(parts, "model")


@pytest.mark.slow
@pytest.mark.usefixtures("folders")
def test_models_die_with_their_last_output():
    """As when the graph changes and ComfyUI drops what it had cached: no reference of ours remains."""
    parts = load()
    results = generate(parts)
    watched = {name: weakref.ref(patcher) for name, patcher in patchers(parts).items()}
    watched |= {f"{name} network": weakref.ref(patcher.model) for name, patcher in patchers(parts).items()}
    watched |= {f"result {i}": weakref.ref(result) for i, result in enumerate(results)}
    del parts, results
    gc.collect()
    assert [name for name, reference in watched.items() if reference() is not None] == []
    comfy.model_management.cleanup_models()
    assert not loaded()


@pytest.mark.slow
@pytest.mark.usefixtures("folders")
def test_each_model_alone_can_be_replaced():
    """Another checkpoint while text encoder and VAEs stay: only the old model goes."""
    parts = load()
    first = generate(parts)
    old, network = weakref.ref(parts["model"]), weakref.ref(parts["model"].model)
    kept = {name: patcher for name, patcher in patchers(parts).items() if name != "model"}
    parts["model"] = load()["model"]
    gc.collect()
    assert old() is None and network() is None
    assert all(torch.equal(a, b) for a, b in zip(generate(parts), first, strict=True))
    assert patchers(parts).items() >= kept.items()


def holdings(thing, path: str, seen: set[int]):
    """Every heavy object reachable from a module's names through containers, classes and closures of the pack."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, HEAVY):
        if not isinstance(thing, torch.Tensor) or thing.numel() > 4096:
            yield path
        return
    inside: dict = {}
    if isinstance(thing, dict):
        inside = {**thing, **{f"key {key!r}": key for key in thing}}
    elif isinstance(thing, list | tuple | set | frozenset):
        inside = dict(enumerate(thing))
    elif isinstance(thing, type | types.FunctionType) and str(thing.__module__).startswith("ovi_native"):
        inside = dict(vars(thing))
        if isinstance(thing, types.FunctionType):
            inside |= {"defaults": thing.__defaults__,
                       "closure": [cell.cell_contents for cell in thing.__closure__ or ()]}
    elif type(thing).__module__.startswith("ovi_native") and hasattr(thing, "__dict__"):
        inside = vars(thing)
    for name, value in inside.items():
        yield from holdings(value, f"{path}.{name}", seen)


@pytest.mark.usefixtures("folders")
def test_no_module_of_the_pack_holds_a_model_or_a_large_tensor():
    parts = load()
    generate(parts)
    modules = {name: module for name, module in sys.modules.items() if name.startswith("ovi_native")}
    assert len(modules) > 10 and NODES
    assert list(holdings({name: vars(module) for name, module in modules.items()}, "", set())) == []

    probe = types.SimpleNamespace(cache={"last": [parts["audio_vae"]]})  # the search does see what it looks for
    assert list(holdings(vars(probe), "", set())) == [".cache.last.0"]
