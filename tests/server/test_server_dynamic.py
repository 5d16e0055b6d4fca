"""Whole workflows in the real server with DynamicVRAM on: loaders, text, LoRA, hooks, sampling, decoding, mp4.

The server runs with `--cpu`, which switches DynamicVRAM off; a custom node of the test's switches it on before any
model is loaded, as `main.py` would, with `loading_state.DynamicOnCpu` for the patcher. Files come as read-only
mappings, weights stay in them, and every model is a dynamic one. Unseen remains what needs a GPU: comfy-aimdo's
address space, pinned memory, streams, prefetching, and moving anything at all.
"""

from pathlib import Path

import pytest
import torch
from devlib import graphs, media
from devlib.client import ComfyClient
from devlib.graphs import change, decode, files, node, run_latents, save_clip, save_latents, text_to_av
from devlib.server import ComfyServer
from devlib.weights import TINY
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

NODE = Path(__file__).with_name("dynamic_vram_node")
LORA = "dynamic_vram_lora.safetensors"


@pytest.fixture(scope="module")
def server(tmp_path_factory, comfy_server, tiny_models):
    base = tmp_path_factory.mktemp("dynamic")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "dynamic_vram_on").symlink_to(NODE, target_is_directory=True)
    with ComfyServer(base, found=comfy_server.comfyui, models=tiny_models) as running:
        assert "dynamic_vram_on" in running.log_text() and "IMPORT FAILED" not in running.log_text()
        yield running


@pytest.fixture
def dynamic_client(server):
    with ComfyClient(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def lora_name(tiny_models):
    """A LoRA for one matrix of the tiny bundle's model."""
    name = "blocks.0.ffn.0.weight"
    with safe_open(tiny_models / "diffusion_models" / TINY["model"], "pt") as file:
        key = next(key for key in file.keys() if key.endswith(name) and "audio_model" not in key)
        out, into = file.get_slice(key).get_shape()
    folder = tiny_models / "loras"
    folder.mkdir(exist_ok=True)
    layer = "diffusion_model.blocks.0.ffn.0"
    generator = torch.Generator().manual_seed(0)
    save_file({f"{layer}.lora_B.weight": torch.randn(out, 4, generator=generator),
               f"{layer}.lora_A.weight": 0.1 * torch.randn(4, into, generator=generator)}, folder / LORA)
    yield LORA
    (folder / LORA).unlink()


def with_lora(graph, name):
    graph = change(graph, sampler={"model": ["lora", 0]})
    return graph | {"lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=1.0)}


def with_hook(graph, name):
    """The LoRA on the positive text alone: core samples with a static copy."""
    graph = change(graph, sampler={"positive": ["hooked", 0]})
    return graph | {
        "hook": node("CreateHookLoraModelOnly", lora_name=name, strength_model=1.0),
        "hooked": node("ConditioningSetProperties", cond_NEW=["prompt", 0], strength=1.0, set_cond_area="default",
                       hooks=["hook", 0])}


def test_text_to_mp4_twice(dynamic_client, server):
    graph = save_clip(decode(text_to_av()))
    for _ in range(2):
        graphs.forget(dynamic_client)
        clip = media.read_media(files(dynamic_client, dynamic_client.run(graph), "save")[0])
        assert clip.frames.shape[0] == 9 and clip.frames.std() > 1
    assert "prepared for dynamic VRAM loading" in server.log_text(), "no model was dynamic"


def test_the_same_latents_as_without(dynamic_client, comfy_client):
    graphs.assert_equal(run_latents(dynamic_client, text_to_av()), run_latents(comfy_client, text_to_av()))


@pytest.mark.parametrize("change_graph", [with_lora, with_hook])
def test_a_lora(dynamic_client, comfy_client, lora_name, change_graph):
    """Stock 'Load LoRA' and LoRA hooks do what they do without DynamicVRAM, and leave nothing behind."""
    plain = run_latents(dynamic_client, text_to_av())
    graph = change_graph(text_to_av(), lora_name)
    found, truth = run_latents(dynamic_client, graph), run_latents(comfy_client, graph)
    for stream in ("video", "audio"):
        torch.testing.assert_close(getattr(found, stream), getattr(truth, stream), rtol=1e-3, atol=1e-3)
    assert float((found.video - plain.video).abs().max()) > 0.01, "the LoRA did nothing"
    graphs.assert_equal(run_latents(dynamic_client, text_to_av(), fresh=True), plain)


def test_a_cancelled_run_leaves_no_trace(dynamic_client):
    truth = run_latents(dynamic_client, text_to_av())

    def stop(kind, data):
        if kind == "progress" and data["node"] == "sampler":
            dynamic_client.interrupt()

    run = dynamic_client.run(save_latents(change(text_to_av(), sampler={"steps": 200})), on_event=stop)
    assert run.status == "interrupted"
    graphs.assert_equal(run_latents(dynamic_client, change(text_to_av(), latent={"seconds": 2.5}), fresh=True), truth)
