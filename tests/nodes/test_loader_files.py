"""What the loaders offer, and that a file replaced under its name is loaded again, by the real server."""

from __future__ import annotations

import json
import os
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import pytest
import torch
from devlib import comfyui
from devlib.client import ExecutionError, RejectedError
from devlib.graphs import added, assert_equal, change, executed, forget, node, run_latents, text_of, text_to_av
from devlib.server import ComfyServer
from devlib.weights import TINY
from devlib.workflows import FILE_INPUTS, schema
from ovi_native.nodes import loaders
from ovi_native.nodes.lora import OviLoraLoader
from ovi_native.server.folders import problem
from safetensors.torch import load_file, save_file

NOT_UTF8 = os.fsdecode(b"good\xff.safetensors")


def lora_for(model: Path, prefix: str, value: float = 0.05) -> dict[str, torch.Tensor]:
    """LoRA on the picture's attention, under Ovi's names with another prefix."""
    out = {}
    for key, weight in load_file(model).items():
        if key.startswith("video_model.blocks.") and key.endswith("attn.q.weight"):
            name = prefix + key.removeprefix("video_model.").removesuffix(".weight")
            out[f"{name}.lora_A.weight"] = torch.full((4, weight.shape[1]), value)
            out[f"{name}.lora_B.weight"] = torch.full((weight.shape[0], 4), value)
    return out


def with_lora(name: str, **inputs) -> dict:
    graph = change(text_to_av(), sampler={"model": ["lora", 0]})
    return graph | {"lora": node("OviLoraLoader", model=["model", 0], lora_name=name, strength=1.0, **inputs)}


def replace(path: Path, tensors: dict, how: str) -> None:
    """Other contents under the same name, of the same length."""
    aside = path.with_suffix(".aside")
    save_file(tensors, aside)
    if how == "renamed":
        os.replace(aside, path)
    else:
        shutil.copyfile(aside, path)
        aside.unlink()


# --- LoRA through the server ------------------------------------------------------------------------------------------


def test_lora_under_ovis_names_equals_the_stock_loader_with_cores(comfy_client, tiny_models):
    model = tiny_models / "diffusion_models" / TINY["model"]
    files = {f"loras/{name}.safetensors": lora_for(model, prefix) for name, prefix in (
        ("ovi", "video_model."), ("bare", ""), ("transformer", "transformer."), ("core", "diffusion_model."))}
    with added(tiny_models, files):
        stock = change(text_to_av(), sampler={"model": ["lora", 0]}) | {"lora": node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name="core.safetensors", strength_model=1.0)}
        truth = run_latents(comfy_client, stock)
        for name in ("ovi", "bare", "transformer"):
            assert_equal(run_latents(comfy_client, with_lora(f"{name}.safetensors")), truth)
        graph = with_lora("ovi.safetensors", video=0.5) | {"show": node("PreviewAny", source=["lora", 0])}
        shown = text_of(comfy_client.run(graph), "lora")
        assert "\npicture: " in shown and ", strength 0.5\nsound: 0 layers" in shown
        plain = run_latents(comfy_client, text_to_av())
        assert not torch.equal(plain.video, truth.video)
        assert_equal(run_latents(comfy_client, with_lora("ovi.safetensors", video=0.0)), plain)


# --- replaced files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["renamed", "written over"])
def test_replaced_model_is_loaded_again(comfy_client, tiny_models, how):
    source = tiny_models / "diffusion_models" / TINY["model"]
    tensors = load_file(source)
    path = source.with_name("ovi_960_swapped.safetensors")
    graph = change(text_to_av(), model={"model_name": path.name})
    try:
        save_file(tensors, path)
        before = run_latents(comfy_client, graph)
        again = comfy_client.run(change(graph, sampler={"seed": 8}) | {
            "show": node("PreviewAny", source=["sampler", 0])})
        assert "model" not in executed(again)  # while the file stays, the model does
        replace(path, {key: value + 0.02 if value.ndim == 2 else value for key, value in tensors.items()}, how)
        after = run_latents(comfy_client, graph)
        forget(comfy_client)
        assert_equal(after, run_latents(comfy_client, change(graph, sampler={"seed": 7})))
        assert not torch.equal(after.video, before.video)
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["renamed", "written over"])
def test_replaced_lora_is_loaded_again(comfy_client, tiny_models, how):
    model, path = tiny_models / "diffusion_models" / TINY["model"], tiny_models / "loras" / "style.safetensors"
    with added(tiny_models, {"loras/style.safetensors": lora_for(model, "video_model.")}):
        before = run_latents(comfy_client, with_lora(path.name))
        replace(path, lora_for(model, "video_model.", 0.02), how)
        after = run_latents(comfy_client, with_lora(path.name))
    with added(tiny_models, {"loras/other.safetensors": lora_for(model, "video_model.", 0.02)}):
        assert_equal(after, run_latents(comfy_client, with_lora("other.safetensors")))
    assert not torch.equal(after.video, before.video)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's model folders in an empty place of their own."""
    for name in ("diffusion_models", "text_encoders", "vae", "loras"):
        (tmp_path / name).mkdir()
        extensions = folder_paths.folder_names_and_paths[name][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], extensions))
    return tmp_path


FINGERPRINTS = {
    "model": (loaders.OviModelLoader, {"model_name": "ovi_video.safetensors", "second_file": "automatic"},
              "diffusion_models/ovi_video.safetensors"),
    "its other half, found": (
        loaders.OviModelLoader, {"model_name": "ovi_video.safetensors", "second_file": "automatic"},
        "diffusion_models/ovi_audio.safetensors"),
    "its other half, named": (
        loaders.OviModelLoader, {"model_name": "ovi_video.safetensors", "second_file": "b.safetensors"},
        "diffusion_models/b.safetensors"),
    "text encoder": (loaders.OviTextEncoderLoader, {"text_encoder_name": "t5.pth", "tokenizer_name": "automatic"},
                     "text_encoders/t5.pth"),
    "tokenizer, found": (loaders.OviTextEncoderLoader, {"text_encoder_name": "t5.pth", "tokenizer_name": "automatic"},
                         "text_encoders/umt5-xxl/spiece.model"),
    "tokenizer, beside": (loaders.OviTextEncoderLoader, {"text_encoder_name": "t5.pth", "tokenizer_name": "automatic"},
                          "text_encoders/t5.model"),
    "tokenizer, named": (
        loaders.OviTextEncoderLoader, {"text_encoder_name": "t5.pth", "tokenizer_name": "sub/tokenizer.json"},
        "text_encoders/sub/tokenizer.json"),
    "audio VAE": (loaders.OviAudioVAELoader, {"vae_name": "v.pth", "vocoder_name": "b.pt"}, "vae/v.pth"),
    "vocoder": (loaders.OviAudioVAELoader, {"vae_name": "v.pth", "vocoder_name": "b.pt"}, "vae/b.pt"),
    **{f"one of three: {file}": (
        loaders.OviVAELoader, {"video_vae_name": "w.safetensors", "audio_vae_name": "v.pth", "vocoder_name": "b.pt"},
        f"vae/{file}") for file in ("w.safetensors", "v.pth", "b.pt")},
    "LoRA": (OviLoraLoader, {"lora_name": "x.safetensors", "strength": 1.0, "video": 0.5}, "loras/x.safetensors"),
}


@pytest.mark.parametrize("case", FINGERPRINTS)
def test_every_file_of_every_loader_counts(folders, case):
    loader, inputs, file = FINGERPRINTS[case]
    for _, _, other in FINGERPRINTS.values():
        (folders / other).parent.mkdir(exist_ok=True)
        (folders / other).write_bytes(b"12345678")
    before = loader.fingerprint_inputs(**inputs)
    assert loader.fingerprint_inputs(**inputs) == before
    (folders / file).write_bytes(b"123456789")
    longer = loader.fingerprint_inputs(**inputs)
    os.utime(folders / file, ns=(1, 1))
    older = loader.fingerprint_inputs(**inputs)
    (folders / file).unlink()
    gone = loader.fingerprint_inputs(**inputs)  # to say it in words is the loader's part
    assert len({before, longer, older, gone}) == 4
    loader.fingerprint_inputs()  # linked inputs are not known yet


def test_missing_file_is_still_said_in_words(comfy_client, tiny_models):
    with added(tiny_models, {"loras/there.safetensors": {"x.lora_A.weight": torch.zeros(2, 2)}}):
        graph = with_lora("gone.safetensors") | {"show": node("PreviewAny", source=["lora", 0])}
        with pytest.raises(RejectedError, match=r"lora_name: 'gone\.safetensors' not in "):
            comfy_client.run(graph)


# --- what the loaders begin with --------------------------------------------------------------------------------------


def test_every_loader_begins_with_the_file_of_its_role(comfy_client):
    """The files of the shared server are tiny ones; each list has more than its own."""
    info = comfy_client.object_info()
    for node_type, inputs in FILE_INPUTS.items():
        for name, role in inputs.items() if node_type.startswith("Ovi") else ():
            assert schema(info, node_type, name)[1]["default"] == TINY[role]


# --- what can be a tokenizer ------------------------------------------------------------------------------------------


def test_only_what_can_be_a_tokenizer_is_offered(folders):
    place = folders / "text_encoders"
    (place / "umt5").mkdir()
    for name in ("t5.pth", "t5.pt", "broken.safetensors", "spiece.model", "umt5/tokenizer.json", "umt5_tokenizer.json",
                 "tokenizer_config.json", "model.safetensors.index.json"):
        (place / name).write_bytes(b"\xff" * 20)
    save_file({"shared.weight": torch.zeros(2, 2)}, place / "plain.safetensors")
    save_file({"spiece_model": torch.zeros(2, dtype=torch.uint8)}, place / "inside.safetensors")
    expected = ["automatic", "spiece.model", "umt5/tokenizer.json", "umt5_tokenizer.json", "inside.safetensors"]
    assert [name.replace(os.sep, "/") for name in loaders.tokenizer_options()] == expected

    check = loaders.OviTextEncoderLoader.validate_inputs
    assert all(check(name) is True for name in loaders.tokenizer_options()) and check() is True
    assert check("t5.pth") == ("t5.pth holds no tokenizer. Choose automatic, which looks inside and beside the "
                               "encoder, or a spiece.model or tokenizer.json.")
    assert check("gone.model").startswith("gone.model is not in models/text_encoders. Choose automatic")

    save_file({"tokenizer_json": torch.zeros(2, dtype=torch.uint8)}, place / "plain.safetensors")
    assert "plain.safetensors" in loaders.tokenizer_options(), "an old answer was kept"


def test_saved_workflow_that_names_no_tokenizer_is_refused_in_words(comfy_client, tiny_models):
    with added(tiny_models, {"text_encoders/wan.pth": {"x": torch.zeros(1)}}):
        graph = change(text_to_av(), clip={"tokenizer_name": "wan.pth"}) | {
            "show": node("PreviewAny", source=["clip", 0])}
        with pytest.raises(RejectedError, match=r"wan\.pth holds no tokenizer\. Choose automatic"):
            comfy_client.run(graph)
        comfy_client.run(change(graph, clip={"tokenizer_name": TINY["text_encoder"]}))  # has one inside


# --- names that are not UTF-8 -----------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX systems alone")
def test_names_that_are_not_utf8_are_listed_and_do_not_stop_the_worker(comfy_client, tiny_models):
    content = {"x": torch.zeros(1)}
    with added(tiny_models, {f"{folder}/{NOT_UTF8}": content
                             for folder in ("diffusion_models", "text_encoders", "vae", "loras")}):
        info = comfy_client.object_info()
        for loader, name in (("OviModelLoader", "model_name"), ("OviTextEncoderLoader", "text_encoder_name"),
                             ("OviAudioVAELoader", "vae_name"), ("OviLoraLoader", "lora_name")):
            assert NOT_UTF8 in info[loader]["input"]["required"][name][1]["options"]
        graph = change(text_to_av(), clip={"tokenizer_name": NOT_UTF8}) | {
            "show": node("PreviewAny", source=["clip", 0])}
        with pytest.raises(RejectedError, match=r"good\S+\.safetensors holds no tokenizer"):
            comfy_client.run(graph, timeout=60)
        graph = with_lora(NOT_UTF8) | {"show": node("PreviewAny", source=["lora", 0])}
        with pytest.raises(ExecutionError, match=r"good\S+\.safetensors cannot be opened: its name is not written in"):
            comfy_client.run(graph, timeout=60)
    comfy_client.run({"1": node("PreviewAny", source=["2", 0]), "2": node("PrimitiveInt", value=4711)}, timeout=60)


# --- the pack's folder ------------------------------------------------------------------------------------------------


class Renamed(ComfyServer):
    """A server with the pack in a folder of another name."""

    def __init__(self, base: Path, name: str) -> None:
        super().__init__(base, found=comfyui.find())
        self.name = name

    def command(self) -> list[str]:
        command = super().command()
        link = self.base / "custom_nodes" / "ovi-native"
        link.rename(link.with_name(self.name))
        return command


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def renamed(tmp_path: Path) -> Iterator[Renamed]:
    with Renamed(tmp_path, "ovi-native-main (1) é") as server:
        yield server


@pytest.mark.slow
def test_pages_templates_and_script_answer_in_an_oddly_named_folder(renamed):
    name = urllib.parse.quote(renamed.name)
    with urllib.request.urlopen(f"{renamed.url}/extensions") as answer:
        script, = (path for path in json.load(answer) if path.endswith("ovi_weights.js"))
    for path in (script, f"/extensions/{name}/docs/OviModelLoader.md", f"/api/extensions/{name}/docs/OviSampler.md",
                 f"/api/workflow_templates/{name}/ovi_text_to_av.json",
                 f"/api/workflow_templates/{name}/ovi_text_to_av.jpg"):
        assert status(renamed.url + path) == 200, path
    for path in (f"/extensions/{name}/docs/None.md", f"/extensions/{name}/..%2F__init__.py", f"/extensions/{name}/docs",
                 f"/extensions/{name}/%2e%2e/__init__.py", f"/extensions/{name}//etc/passwd", "/extensions/x/y.js"):
        assert status(renamed.url + path) in (403, 404), path
    assert "Rename the folder" not in renamed.log_text()


@pytest.mark.slow
def test_name_that_cannot_be_served_is_said_at_start(tmp_path):
    with Renamed(tmp_path, "ovi#native") as server:
        log = server.log_text()
    assert "Ovi Native is in a folder called 'ovi#native', a name that ComfyUI's pages cannot ask for" in log
    assert "Rename the folder to ovi-native and restart." in log


@pytest.mark.parametrize("name", ["ovi-native", "Ovi_Native-1.2", "ovi-native-main (1)", "ünï"])
def test_no_sentence_where_it_works(name):
    assert problem(name) is None


@pytest.mark.parametrize("name", ["ovi#native", "ovi%20native", "a?b", "a{b}", "a\\b"])
def test_sentence_where_it_does_not(name):
    assert "Rename the folder to ovi-native" in problem(name)
