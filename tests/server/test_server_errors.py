"""Wrong connections, wrong files and odd texts in the real server: a sentence on the right node, and no harm done."""

import itertools
import pickle
import urllib.request

import pytest
import torch
from devlib import graphs
from devlib.client import ComfyClient, ExecutionError, RejectedError
from devlib.graphs import (
    change,
    decode,
    executed,
    image_to_av,
    k_sampler,
    node,
    run_latents,
    save_latents,
    save_media,
    stock_sampler,
    text_of,
    text_to_av,
)
from devlib.weights import TINY
from safetensors.torch import load, load_file
from tiny.text_encoder import text_encoder

WORKS = change(text_to_av(), sampler={"steps": 1})
seconds = (n / 1000 for n in itertools.count(1))  # an input without effect here, which keeps the server's cache out

VIDEO_ONLY = node("EmptyHunyuanLatentVideo", width=96, height=64, length=9, batch_size=1)
PLAIN_WAN = node("UNETLoader", unet_name="plain_wan.safetensors", weight_dtype="default")


@pytest.fixture(scope="module")
def truth(comfy_server):
    """What WORKS gives before anything went wrong."""
    with ComfyClient(comfy_server.url) as client:
        return run_latents(client, WORKS)


@pytest.fixture
def client(comfy_client, truth):
    """A client; after the test the server must still sample, with the same result."""
    yield comfy_client
    after = run_latents(comfy_client, change(WORKS, latent={"seconds": next(seconds)}), fresh=True)
    graphs.assert_equal(after, truth)


def refusal(client, graph, at, kind="ValueError") -> str:
    """The sentence with which the node called `at` stops the graph."""
    with pytest.raises(ExecutionError) as stopped:
        client.run(graph)
    event = stopped.value.event
    assert (event["node_id"], event["node_type"]) == (at, graph[at]["class_type"])
    assert event["exception_type"] == kind
    message = stopped.value.message
    assert message.endswith(".") and "\n" not in message
    return message


def rejection(client, graph, at, name) -> str:
    """Why the server refuses the graph before running it: the message about one input of the node called `at`."""
    with pytest.raises(RejectedError) as refused:
        client.run(graph)
    assert list(refused.value.errors) == [at]
    reasons = [error for error in refused.value.reasons if error["extra_info"]["input_name"] == name]
    assert len(reasons) == 1
    return reasons[0]["message"]


def with_latent(graph, **nodes):
    """`graph` sampling the output of the last of `nodes`."""
    graph = graph | nodes
    source = [list(nodes)[-1], 0]
    sampler = graph["sampler"]["inputs"]
    return change(graph, sampler={name: source for name in ("latent", "latent_image") if name in sampler})


# --- wrong connections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [text_to_av(), k_sampler(), stock_sampler()], ids=["ours", "KSampler", "custom"])
@pytest.mark.parametrize("latent", [
    VIDEO_ONLY, node("Wan22ImageToVideoLatent", vae=["vae", 0], width=96, height=64, length=9, batch_size=1)],
    ids=["hunyuan", "wan22"])
def test_video_only_latent(client, graph, latent):
    message = refusal(client, save_latents(with_latent(graph, alone=latent)), "sampler")
    assert "joint latent" in message and "[1, 48, 3, 4, 6]" in message and "'Ovi Empty Latent'" in message


@pytest.mark.parametrize("graph", [text_to_av(), k_sampler()], ids=["ours", "KSampler"])
def test_audio_and_video_swapped(client, graph):
    swapped = with_latent(graph, split=node("LTXVSeparateAVLatent", av_latent=["latent", 0]),
                          swapped=node("LTXVConcatAVLatent", video_latent=["split", 1], audio_latent=["split", 0]))
    message = refusal(client, save_latents(swapped), "sampler")
    assert "[1, 20, 11] and [1, 48, 3, 4, 6]" in message and "'Ovi Empty Latent'" in message


def test_video_only_latent_in_the_latent_nodes(client):
    single = text_to_av() | {"alone": VIDEO_ONLY}
    message = refusal(client, save_media(decode(single, "alone")), "decode")
    assert "'Ovi Decode' needs a joint" in message and "'VAE Decode'" in message
    graph = change(image_to_av() | {"alone": VIDEO_ONLY}, first={"latent": ["alone", 0]})
    message = refusal(client, save_latents(graph), "first")
    assert "'Ovi First Frame' needs a joint latent" in message


@pytest.mark.parametrize("graph, at", [
    (save_latents(text_to_av()), "sampler"), (save_latents(stock_sampler()), "guider"),
    (save_latents(change(k_sampler() | {"guided": node("OviAudioGuidance", model=["model", 0], audio_guidance=2.0)},
                         sampler={"model": ["guided", 0]})), "guided")], ids=["sampler", "guider", "audio guidance"])
def test_another_model(client, tiny_models, graph, at):
    with graphs.added(tiny_models, {"diffusion_models/plain_wan.safetensors": plain_wan(tiny_models)}):
        message = refusal(client, graph | {"model": PLAIN_WAN}, at)
    assert "needs an Ovi model, but got WAN" in message and "'Load Ovi Model'" in message


def plain_wan(models) -> dict:
    """A plain Wan2.2 video model: the video tower alone, without what fuses it, at the text width core insists on."""
    weights = load_file(models / "diffusion_models" / TINY["model"])
    weights = {name.removeprefix("video_model.").replace(".modulation.modulation", ".modulation"): value
               for name, value in weights.items() if name.startswith("video_model.") and "fusion" not in name}
    text = weights["text_embedding.0.weight"]
    weights["text_embedding.0.weight"] = torch.nn.functional.pad(text, (0, 4096 - text.shape[1]))
    return weights


def test_vaes_the_wrong_way_round(client):
    graph = save_media(decode(text_to_av()))
    message = refusal(client, change(graph, decode={"video_vae": ["audio_vae", 0]}), "decode")
    assert "20 latent channels" in message and "Wan2.2 VAE" in message
    message = refusal(client, change(graph, decode={"audio_vae": ["vae", 0]}), "decode")
    assert "MMAudio" in message and "'Load Ovi Audio VAE'" in message
    message = refusal(client, save_latents(change(image_to_av(), first={"vae": ["audio_vae", 0]})), "first")
    assert "20 latent channels" in message


def test_text_encoder_of_another_width(client, tiny_models):
    graph = save_latents(change(text_to_av(), clip={"text_encoder_name": "narrow.safetensors"}))
    with graphs.added(tiny_models, {"text_encoders/narrow.safetensors": text_encoder(0, width=64)}):
        message = refusal(client, graph, "sampler")
    assert "64" in message and "128" in message and "UMT5" in message


def test_skip_layer_that_the_model_does_not_have(client):
    for layer in (4, 11):
        message = refusal(client, save_latents(change(text_to_av(), sampler={"skip_layer": layer})), "sampler")
        assert f"Skip layer {layer} does not exist" in message and "blocks 0 to 3" in message and "-1" in message
    run_latents(client, change(text_to_av(), sampler={"skip_layer": 3}))


@pytest.mark.parametrize("at, name, value, message", [
    ("sampler", "steps", 0, "smaller than min"), ("sampler", "skip_layer", 1000, "bigger than max"),
    ("sampler", "denoise", 1.5, "bigger than max"), ("sampler", "shift", 0.0, "smaller than min"),
    ("sampler", "solver", "ddim", "not in list"), ("latent", "batch_size", 0, "smaller than min"),
    ("latent", "seconds", 121.0, "bigger than max"), ("latent", "aspect", "5x5", "Custom validation failed"),
    ("latent", "variant", "1080p", "not in list"), ("decode", "tile_frames", 4, "smaller than min")])
def test_values_out_of_range_are_rejected_before_running(comfy_client, at, name, value, message):
    graph = save_media(decode(text_to_av()))
    assert message in rejection(comfy_client, change(graph, **{at: {name: value}}), at, name)


# --- wrong files ------------------------------------------------------------------------------------------------------


LOADERS = {"model": ("model_name", "diffusion_models", TINY["model"]),
           "clip": ("text_encoder_name", "text_encoders", TINY["text_encoder"]),
           "audio_vae": ("vae_name", "vae", TINY["audio_vae"]),
           "vocoder": ("vocoder_name", "vae", TINY["vocoder"])}


def loaded(role, name):
    """A graph that loads `name` in a role, and the id of the loader."""
    at = "audio_vae" if role == "vocoder" else role
    return change(save_media(decode(text_to_av())), **{at: {LOADERS[role][0]: name}}), at


@pytest.mark.parametrize("content, words", [
    ("first half", "damaged or only partly downloaded"), (b"Dear model,\n" * 100, "damaged or only partly downloaded"),
    (b"", "damaged or only partly downloaded"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS placeholder"),
    (b"<!DOCTYPE html><html><body>401</body></html>", "is a web page")],
    ids=["truncated", "text", "empty", "git-lfs", "web-page"])
def test_damaged_files(client, tiny_models, content, words):
    for role, (_, folder, good) in LOADERS.items():
        data = (tiny_models / folder / good).read_bytes()
        data = data[: len(data) // 2] if content == "first half" else content
        graph, at = loaded(role, "broken.safetensors")
        with graphs.added(tiny_models, {f"{folder}/broken.safetensors": data}):
            message = refusal(client, graph, at, "RuntimeError")
        assert message.startswith("broken.safetensors") and words in message, role


class Bait:
    """Unpickling this writes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("name", ["bait.pth", "bait.pt", "bait.ckpt", "bait.safetensors"])
def test_code_in_a_pickle_never_runs(client, tiny_models, tmp_path, name):
    marker = tmp_path / "it ran"
    for role, (_, folder, _) in LOADERS.items():
        graph, at = loaded(role, name)
        content = pickle.dumps({"weight": Bait(marker)}) if name.endswith("safetensors") else {"weight": Bait(marker)}
        with graphs.added(tiny_models, {f"{folder}/{name}": content}):
            message = refusal(client, graph, at, "RuntimeError")
        assert message.startswith(name), role
        assert name.endswith("safetensors") or "Files that carry code are never opened" in message
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bait(marker))).close()
    assert marker.exists()  # the bait is live


def test_files_of_another_kind(client, tiny_models):
    model, text, vae, vocoder, video_vae = (
        (tiny_models / folder / name).read_bytes() for folder, name in (
            ("diffusion_models", TINY["model"]), ("text_encoders", TINY["text_encoder"]), ("vae", TINY["audio_vae"]),
            ("vae", TINY["vocoder"]), ("vae", TINY["video_vae"])))
    for role, content, words in (
            ("model", text, "a UMT5 text encoder"), ("model", vocoder, "BigVGAN"), ("model", video_vae, "video VAE"),
            ("clip", vae, "an MMAudio 16 kHz VAE"), ("clip", model, "an Ovi checkpoint"),
            ("audio_vae", video_vae, "video VAE"), ("audio_vae", model, "an Ovi checkpoint"),
            ("vocoder", vae, "MMAudio"), ("vocoder", text, "a UMT5 text encoder")):
        folder = LOADERS[role][1]
        graph, at = loaded(role, "mistaken.safetensors")
        with graphs.added(tiny_models, {f"{folder}/mistaken.safetensors": content}):
            message = refusal(client, graph, at, "RuntimeError")
        assert "mistaken.safetensors" in message and words in message, (role, message)


def test_plain_wan_checkpoint_in_our_loader(client, tiny_models):
    graph, at = loaded("model", "plain_wan.safetensors")
    with graphs.added(tiny_models, {"diffusion_models/plain_wan.safetensors": plain_wan(tiny_models)}):
        message = refusal(client, graph, at, "RuntimeError")
    assert message.startswith("plain_wan.safetensors is a Wan video model") and "audio tower" in message
    assert "model_960x960.safetensors" in message


def test_incomplete_checkpoint(client, tiny_models):
    weights = load_file(tiny_models / "diffusion_models" / TINY["model"])
    del weights["audio_model.blocks.2.cross_attn.k_fusion.weight"]
    graph, at = loaded("model", "holey.safetensors")
    with graphs.added(tiny_models, {"diffusion_models/holey.safetensors": weights}):
        message = refusal(client, graph, at, "RuntimeError")
    assert "holey.safetensors" in message and "audio_model.blocks.2.cross_attn.k_fusion.weight" in message


def test_mmaudio_files_swapped_or_alone(client):
    graph = save_media(decode(text_to_av()))
    swapped = change(graph, audio_vae={"vae_name": TINY["vocoder"], "vocoder_name": TINY["audio_vae"]})
    message = refusal(client, swapped, "audio_vae", "RuntimeError")
    assert "swapped" in message and TINY["vocoder"] in message and TINY["audio_vae"] in message
    alone = change(graph, audio_vae={"vocoder_name": "none (single merged file)"})
    assert "without its vocoder" in refusal(client, alone, "audio_vae", "RuntimeError")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..\\..\\secret.safetensors",
                                  f"../diffusion_models/{TINY['model']}"])
def test_names_that_leave_the_model_folders_are_rejected(comfy_client, name):
    for role in LOADERS:
        graph, at = loaded(role, name)
        assert rejection(comfy_client, graph, at, LOADERS[role][0]) == "Value not in list"
    graph = change(save_latents(text_to_av()), clip={"tokenizer_name": name})
    assert rejection(comfy_client, graph, "clip", "tokenizer_name") == "Custom validation failed for node"


# --- texts ------------------------------------------------------------------------------------------------------------


def test_two_audio_captions(client):
    for inline in ("Audio: wind.", "<AUDCAP>wind<ENDAUDCAP>"):
        graph = change(text_to_av(), prompt={"scene": f"A hill. {inline}", "audio_caption": "rain"})
        message = refusal(client, save_latents(graph), "prompt")
        assert "audio caption is given twice" in message and "audio_caption" in message


def test_long_prompt_is_cut_visibly_and_still_runs(client):
    words = " ".join(f"stone {number}" for number in range(300))
    run = client.run(save_latents(change(WORKS, prompt={"scene": words, "audio_caption": ""})))
    assert "sampler" in executed(run)
    warning, = (line for line in text_of(run, "prompt").splitlines() if line.startswith("⚠ prompt has "))
    assert "512 are read" in warning and "were cut: …" in warning and "stone" in warning.partition("cut: ")[2]
    cut = client.run(save_latents(change(WORKS, prompt={"scene": words + " and more", "audio_caption": ""})))
    latents = [graphs.files(client, one, "video_latent")[0] for one in (run, cut)]
    assert torch.equal(*(load(data)["latent_tensor"] for data in latents))  # the end has no effect


@pytest.mark.parametrize("prompt", [
    dict.fromkeys(("scene", "audio_caption", "video_negative", "audio_negative"), ""),
    {"scene": "🤖 sagt <S>Grüß Gott, 你好, مرحبا 👋🏽<E>", "audio_caption": "café noise\u200d\u00a0"},
    {"scene": "tab\tnull\0 bell\a \r\n \ufeff", "audio_caption": "\\(\\) embedding:none {a|b} %date%"}],
    ids=["empty", "unicode", "control"])
def test_odd_texts_run(client, prompt):
    found = run_latents(client, change(WORKS, prompt=prompt))
    assert found.video.isfinite().all() and found.audio.isfinite().all()
    run = client.run(save_latents(change(WORKS, prompt=prompt)))
    shown = text_of(run, "prompt")
    assert ("⚠ The prompt is empty." in shown) == (not prompt["scene"])
    assert "👋🏽" not in prompt["scene"] or "<S>Grüß Gott, 你好, مرحبا 👋🏽<E>" in shown


def test_brackets_are_words_and_no_weights(client):
    """Our prompt with brackets equals the stock node's with escaped ones, and not the stock node's weighted one."""
    scene = "a (heavy:1.5) stone (at 3:30)"
    graph = change(WORKS, prompt={"scene": scene, "audio_caption": ""})
    ours = run_latents(client, graph)
    escaped = scene.replace("(", "\\(").replace(")", "\\)")
    stock = {text: run_latents(client, change(
        graph | {"stock": node("CLIPTextEncode", clip=["clip", 0], text=text)}, sampler={"positive": ["stock", 0]}))
        for text in (escaped, scene)}
    graphs.assert_equal(ours, stock[escaped])
    assert float((ours.video - stock[scene].video).abs().max()) > 0.1


def test_the_server_answers_on(comfy_client):
    """After all of the above nothing hangs in the queue."""
    queue = comfy_client.request("/queue")
    assert not queue["queue_running"] and not queue["queue_pending"]
    assert urllib.request.urlopen(comfy_client.url).status == 200
