"""'Ovi Train LoRA', executed as ComfyUI executes a node: what it trains, what it leaves, how it ends."""

import gc
import shutil
import weakref
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from devlib.graphs import assert_equal, change, loaders, node, run_latents, text_of, text_to_av
from ovi_native.nodes.lora import OviLoraLoader
from ovi_native.nodes.training_lora import OviTrainLora
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.training import network
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.clip_files import write_clip
from support.loading_state import DynamicOnCpu, dynamic_vram
from support.loras import assert_same, weights
from support.training import MemoryClips
from tiny.models import plain_wan, write_checkpoint
from tiny.sizes import Sizes

SIZES = Sizes(heads=1, blocks=2, ffn=128, text=16, conv_hidden=32)
CLIPS = MemoryClips(width=16)
INPUTS = {item.id: item.default for item in OviTrainLora.define_schema().inputs if item.id not in ("model", "dataset")}


@pytest.fixture
def model(tmp_path):
    with torch.inference_mode():
        return checkpoint.load_model(str(write_checkpoint(tmp_path, "ovi_960x960_5s.safetensors", SIZES)))[0]


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch) -> Path:
    """ComfyUI's output folder, as `main.py` enters it among those of LoRA."""
    folder = tmp_path / "output"
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    folders, endings = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([*folders, str(folder / "loras")], endings))
    folder_paths.filename_list_cache.pop("loras", None)
    return folder


def train(model, dataset=CLIPS, **inputs):
    with torch.inference_mode():
        return OviTrainLora.execute(model, dataset, **{**INPUTS, "steps": 4, "rank": 4, "alpha": 4.0,
                                                       "learning_rate": 1e-2, **inputs}).result


def left_behind(model) -> list[str]:
    modules = list(model.model.modules())
    return ([f"{type(m).__name__} has hooks" for m in modules if m._forward_hooks or "forward" in vars(m)]
            + [name for name, p in model.model.named_parameters() if p.requires_grad or p.grad is not None]
            + ["in_training"] * comfy.model_management.in_training)


@pytest.mark.usefixtures("either_loading")
def test_it_trains_a_lora_and_leaves_the_model_as_it_was(model, output, monkeypatch):
    copies: list[weakref.ref] = []
    note = network.Velocity.__init__
    monkeypatch.setattr(network.Velocity, "__init__",
                        lambda self, net, *a: (copies.append(weakref.ref(net)), note(self, net, *a))[1])
    before, loaded = weights(model), len(comfy.model_management.current_loaded_models)
    result, name, report = train(model)
    assert name == "my_lora.safetensors" and "48 layers" in report and "trained 4 of 4 steps" in report
    assert "output/loras" in report
    assert_same(weights(model), before)
    assert not left_behind(model)
    gc.collect()
    assert len(copies) == 1 and copies[0]() is None and len(comfy.model_management.current_loaded_models) <= loaded

    path = output / "loras" / name
    with safe_open(path, "pt") as file:
        assert file.metadata()["steps"] == "4" and file.metadata()["ovi_variant"] == "960x960_5s"
    stock, _ = comfy.sd.load_lora_for_models(model, None, load_file(path), 1.0, 0.0)
    ours = OviLoraLoader.execute(model, name, 1.0).result[0]
    trained = weights(result)
    assert_same(weights(stock), trained)
    assert_same(weights(ours), trained)
    assert sum(not torch.equal(trained[key], before[key]) for key in before) == 48


def test_a_model_that_is_loaded_dynamically_trains_in_a_static_copy(model, output, tmp_path):
    truth = load_file(output / "loras" / train(model)[1])
    with dynamic_vram(patcher=DynamicOnCpu):
        dynamic, _ = checkpoint.load_model(str(tmp_path / "ovi_960x960_5s.safetensors"))
        assert dynamic.is_dynamic()
        result, name, _ = train(dynamic, name="dynamic")
        assert result.is_dynamic() and not left_behind(dynamic)
    assert_same(load_file(output / "loras" / name), truth)


@pytest.mark.usefixtures("either_loading")
def test_a_cancelled_run_keeps_what_was_learnt_and_the_next_goes_on(model, output, monkeypatch):
    truth = load_file(output / "loras" / train(model, name="whole", steps=4)[1])

    def cancel_at(step):
        def update(_self, value, _total=None, *_):
            if value == step:
                comfy.model_management.interrupt_current_processing(True)

        monkeypatch.setattr("comfy.utils.ProgressBar.update_absolute", update)

    cancel_at(2)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(model, name="cut")
    assert not left_behind(model)
    with safe_open(output / "loras" / "cut.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "2"
    assert (output / "ovi_training" / "cut" / "checkpoint_00000002.safetensors").exists()
    cancel_at(None)
    _, name, report = train(model, name="cut")
    assert "goes on after step 2" in report and "4 of 4" in report
    assert_same(load_file(output / "loras" / name), truth)

    (output / "loras" / name).unlink()
    assert train(model, name="cut")[1] == name  # trained already: written again
    assert_same(load_file(output / "loras" / name), truth)


def test_nothing_is_overwritten(model, output):
    first = train(model, resume=False)[1]
    second = train(model, resume=False, seed=1)[1]
    assert (first, second) == ("my_lora.safetensors", "my_lora_2.safetensors")
    assert train(model, steps=5)[1] == second  # goes on with the last
    (output / "loras" / "other.safetensors").write_bytes(b"somebody's")
    assert train(model, name="other")[1] == "other_2.safetensors"
    assert (output / "loras" / "other.safetensors").read_bytes() == b"somebody's"


def test_an_error_leaves_nothing_behind(model, output):
    class Broken(MemoryClips):
        def draw(self, batch, generator, *options):
            if generator.initial_seed() == 2 and options:
                raise RuntimeError("clip 7 cannot be read")
            return super().draw(batch, generator, *options)

    with pytest.raises(RuntimeError, match="clip 7 cannot be read"):
        train(model, Broken(width=16))
    assert not left_behind(model)
    assert (output / "ovi_training" / "my_lora" / "checkpoint_00000002.safetensors").exists()

    class Large(MemoryClips):
        def draw(self, batch, generator, *options):
            if options:
                raise comfy.model_management.OOM_EXCEPTION("no more")
            return super().draw(batch, generator)

    with pytest.raises(RuntimeError, match=r"ran out of memory in step 1\. Lower one of these"):
        train(model, Large(width=16), name="large")
    assert not left_behind(model)
    assert train(model, name="large", rank=2, alpha=2.0)[1] == "large.safetensors"  # as it was told to


@pytest.mark.parametrize("inputs, words", [
    ({"name": "../x"}, "plain file name"), ({"name": ""}, "plain file name"), ({"name": "a/b"}, "plain file name"),
    ({"rank": 0}, "rank of 'Ovi Train LoRA' must be a whole number from 1 to 512, but got 0"),
    ({"learning_rate": float("nan")}, "learning_rate .* but got nan"), ({"towers": "left"}, "towers .* one of both"),
    ({"layers": "everything"}, "layers .* one of all"), ({"name": "\u672c" * 90}, "plain file name"),
    ({"video_given": 0.6, "audio_given": 0.6}, "must not exceed 1 together"),
    ({"dataset": "a folder"}, "dataset .* must come from 'Ovi Dataset', but got 'a folder'"),
    ({"dataset": MemoryClips(width=8)}, "captions were encoded 8 wide, but this model reads text that is 16 wide")])
def test_bad_input(model, inputs, words, output):
    with pytest.raises(ValueError, match=words):
        train(model, **inputs)
    assert not output.exists()


def test_other_adapters_are_not_gone_on_with(model):
    train(model)
    with pytest.raises(ValueError, match=r"my_lora was begun with rank 4, and cannot go on with rank 8.*resume off"):
        train(model, rank=8)
    with pytest.raises(ValueError, match="begun with towers both"):
        train(model, towers="audio")


def test_a_run_is_not_gone_on_with_on_another_model(model, tmp_path):
    """Other weights, or this model with a LoRA on it. The same model from another file is the same."""
    first = train(model)[0]
    path = write_checkpoint(tmp_path, "copy.safetensors", SIZES)
    with torch.inference_mode():
        same = checkpoint.load_model(str(path))[0]
        weights_of = load_file(path)
        save_file({name: value * 1.01 for name, value in weights_of.items()}, tmp_path / "other.safetensors")
        other = checkpoint.load_model(str(tmp_path / "other.safetensors"))[0]
    for changed in (other, first):
        with pytest.raises(ValueError, match=r"my_lora was begun on another model.*resume off"):
            train(changed, steps=5)
    assert "goes on after step 4" in train(same, steps=5)[2]
    with dynamic_vram(patcher=DynamicOnCpu):
        dynamic, _ = checkpoint.load_model(str(path))
        assert "goes on after step 5" in train(dynamic, steps=6)[2]


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Ovi"):
        train(plain_wan())


# --- in a server ------------------------------------------------------------------------------------------------------

CLIPS_FOLDER = "clips to train on"


@pytest.fixture
def graph(comfy_server):
    """Loaders, a dataset of two tiny clips, and a training that shows its report."""
    place = comfy_server.base / "input" / CLIPS_FOLDER
    place.mkdir()
    for seed in range(2):
        write_clip(place / f"{seed}.mp4", seed, 9)
    yield {name: loaders()[name] for name in ("model", "clip", "vae", "audio_vae")} | {
        "data": node("OviDataset", folder=CLIPS_FOLDER, vae=["vae", 0], audio_vae=["audio_vae", 0], clip=["clip", 0],
                     variant="960x960_5s", size=64, longest_seconds=0.4, caption_prefix="", caption_dropout=0.1),
        "train": node("OviTrainLora", model=["model", 0], dataset=["data", 0],
                      **{**INPUTS, "steps": 3, "rank": 2, "learning_rate": 1e-2, "name": "served"}),
        "show": node("PreviewAny", source=["train", 2])}
    shutil.rmtree(place)


def test_in_a_server(comfy_client, comfy_server, graph):
    """Trained, listed by the stock loader and the same there; cancelled, and gone on with."""
    latents = run_latents(comfy_client, text_to_av())
    run = comfy_client.run(graph)
    assert "trained 3 of 3 steps" in text_of(run, "show")
    told = [data["value"] for data in run.of("progress") if data["node"] == "train"]
    assert told in ([1, 2, 3], [1, 3])  # core leaves out what comes within a tenth of a second
    assert "served.safetensors: " in text_of(run, "train")
    assert "served.safetensors" in str(comfy_client.object_info("LoraLoaderModelOnly"))
    assert_equal(run_latents(comfy_client, change(text_to_av(), latent={"seconds": 2.5}), fresh=True), latents)

    sampling = {**text_to_av(), **{name: graph[name] for name in ("data", "train", "vae", "audio_vae")}}
    trained = run_latents(comfy_client, change(sampling, sampler={"model": ["train", 0]}))
    loaded = {**text_to_av(), "lora": node("LoraLoaderModelOnly", model=["model", 0], strength_model=1.0,
                                           lora_name="served.safetensors")}
    assert_equal(run_latents(comfy_client, change(loaded, sampler={"model": ["lora", 0]})), trained)
    assert not torch.equal(trained.video, latents.video) and not torch.equal(trained.audio, latents.audio)

    def stop_after_two(kind, data):  # core leaves progress of less than half a percent out
        if kind == "progress" and data["node"] == "train" and data["value"] >= 2:
            comfy_client.interrupt()

    long = change(graph, train={"name": "long", "steps": 400})
    run = comfy_client.run(long, on_event=stop_after_two)
    assert run.status == "interrupted"
    done = int((comfy_server.base / "output" / "ovi_training" / "long").glob("checkpoint*").__next__().stem[-8:])
    assert 2 <= done < 400 and (comfy_server.base / "output" / "loras" / "long.safetensors").is_file()
    again = comfy_client.run(change(long, train={"steps": done + 1}))
    assert f"goes on after step {done}" in text_of(again, "show")
