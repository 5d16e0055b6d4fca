"""Decoding piece by piece: the same frames as core's decoding of the whole, in memory that does not grow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.model import pytorch_attention
from comfy.ldm.wan.vae2_2 import WanVAE
from comfy.taesd.taehv import TAEHV
from golden import rebuild_weights
from ovi_native.ovi_model.media import video_vae
from ovi_native.ovi_model.media.video_vae import chunk_memory, decode_chunks, decoder_for
from safetensors.torch import load_file
from tiny import wan_vae
from tiny.fake_gpu import Allocations
from tiny.video_vae import video_vae as taehv_weights
from tiny.wan_vae import latents
from torch._subclasses import FakeTensorMode

TESTS = Path(__file__).resolve().parent
MEGABYTE = 1 << 20
GIB = 1 << 30


@pytest.fixture(scope="module")
def vaes() -> dict[str, comfy.sd.VAE]:
    """Core's Wan2.2 VAE at a small width, and the TAEHV of the tiny bundle."""
    return {"wan": wan_vae.small_vae(), "taehv": comfy.sd.VAE(sd=taehv_weights(0))}


# --- the frames -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wan", "taehv"])
@pytest.mark.parametrize("frames, batch", [(1, 1), (2, 1), (5, 1), (9, 1), (2, 2), (5, 2)])
def test_pieces_equal_the_whole(vaes, kind, frames, batch):
    vae, video = vaes[kind], latents(frames, batch)
    pieces = list(decode_chunks(vae, video))
    assert [len(piece) for piece in pieces] == ([1] + [4] * (frames - 1)) * batch
    with torch.no_grad():
        whole = vae.decode(video).flatten(0, 1)
    found = torch.cat(pieces)
    assert found.dtype == whole.dtype and not found.requires_grad
    assert float(whole.std()) > 0.05
    assert float((found - whole).abs().max()) <= (1e-6 if batch == 1 else 5e-6)  # core decodes clips side by side


@pytest.mark.parametrize("kind", ["wan", "taehv"])
def test_pieces_depend_on_what_came_before_and_not_on_what_follows(vaes, kind):
    """The control: the comparison above does see what the decoder remembers between latent frames."""
    vae, video = vaes[kind], latents(3)
    truth = list(decode_chunks(vae, video))
    for changed, same, other in ((0, [], [0, 1, 2]), (2, [0, 1], [2])):
        changed_video = video.clone()
        changed_video[:, :, changed] += 1
        found = list(decode_chunks(vae, changed_video))
        assert all(torch.equal(found[i], truth[i]) for i in same)
        assert all(float((found[i] - truth[i]).abs().max()) > 0.01 for i in other)


def test_equals_the_reference(golden):
    manifest = golden / "wan_vae" / "tiny_manifest.json"
    model = WanVAE(**json.loads(manifest.read_text())["config"]).eval()
    model.load_state_dict(rebuild_weights(manifest))
    vae, truth = wan_vae.with_model(model, torch.float32), load_file(golden / "wan_vae" / "golden_tiny.safetensors")
    cases = [name for name in truth if name.startswith("decode.") and name.endswith(".latent")]
    assert len(cases) >= 2
    for name in cases:
        raw = comfy.latent_formats.Wan22().process_out(truth[name].float())
        expected = (truth[name.replace(".latent", ".video_unclamped")] / 2 + 0.5).clamp(0, 1)[0].movedim(0, -1)
        torch.testing.assert_close(torch.cat(list(decode_chunks(vae, raw))), expected, rtol=0, atol=1e-5)


def test_an_unknown_vae_decodes_clip_by_clip(vaes):
    class Other(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def decode(self, video):
            return self.inner.decode(video)

    vae = wan_vae.with_model(Other(wan_vae.small_vae().first_stage_model), torch.float32)
    video = latents(2, 2)
    pieces = list(decode_chunks(vae, video))
    assert [len(piece) for piece in pieces] == [5, 5]
    torch.testing.assert_close(torch.cat(pieces), torch.cat(list(decode_chunks(vaes["wan"], video))), rtol=0, atol=1e-6)


@pytest.mark.parametrize("video, shape", [
    (latents(2, channels=16), r"\[1, 16, 2, 4, 6\]"), (latents(2)[:, :, 0], r"\[1, 48, 4, 6\]"),
    (latents(2)[:, :, :0], r"\[1, 48, 0, 4, 6\]")])
def test_other_latents_are_refused_before_anything_is_loaded(vaes, video, shape):
    with pytest.raises(ValueError, match=rf"{shape} were given; this VAE decodes \[batch, 48, frames, height, width\]"):
        decode_chunks(vaes["wan"], video)


class Plain(torch.nn.Module):
    """A decoder without core's layers, which ask for interruptions themselves."""

    def decode(self, video):
        return torch.nn.functional.interpolate(video[:, :3], scale_factor=(1, 16, 16))


@pytest.mark.parametrize("kind", ["wan", "other"])
def test_interruption_is_honoured_between_pieces(vaes, kind):
    vae = vaes["wan"] if kind == "wan" else wan_vae.with_model(Plain(), torch.float32)
    pieces = decode_chunks(vae, latents(3, batch=2))
    next(pieces)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        next(pieces)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory() -> dict[str, int]:
    """Peak bytes of decoding 16 and 61 latent frames at 128x128 in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the recorded peak of a process")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    run = subprocess.run([sys.executable, str(TESTS / "decode_memory.py")],
                         env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_long_clip_needs_no_more_memory_than_a_short_one(memory):
    assert memory["stream 61"] < memory["stream 16"] + 6 * MEGABYTE
    assert memory["stream 61"] < 40 * MEGABYTE


def test_decoding_it_whole_does_need_more(memory):
    """The control: 180 more frames of 128x128 are 34 MB, and core joins them again and again."""
    assert memory["whole 61"] > memory["whole 16"] + 50 * MEGABYTE


def full_size(kind: str) -> comfy.sd.VAE:
    """The real VAE on fake tensors of the fake CUDA device, with the attention that core uses there."""
    vae = wan_vae.settings(torch.bfloat16)
    model = vae.first_stage_model
    if kind == "wan":
        model.decoder.middle[1].optimized_attention = pytorch_attention
    else:
        with torch.device("meta"):
            vae.first_stage_model = model = TAEHV(latent_channels=48)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with FakeTensorMode():
        model.load_state_dict({name: torch.empty(shape, device="cuda", dtype=torch.bfloat16)
                               for name, shape in shapes.items()}, assign=True)
    return vae


def fake_decode(vae: comfy.sd.VAE, height: int, width: int, park: bool = False) -> tuple[int, int]:
    """Bytes on the fake GPU: the peak of four latent frames, the same from the third on, and what remains between."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        allocations = Allocations("cuda")
        allocations.ignore(vae.first_stage_model)
        decode_one = decoder_for(vae, park)
        peaks = []
        with allocations:
            for _ in range(4):
                latent = torch.empty(1, 48, 1, height // 16, width // 16, device="cuda", dtype=torch.bfloat16)
                piece = video_vae._decode_chunk(vae, latent, decode_one)
                assert piece.device.type == "cuda" and piece.dtype == torch.float32
                (piece * 255).clamp_(0, 255).byte()  # as for the mp4, a picture at a time there
                del piece, latent
                peaks.append(allocations.peak)
        assert peaks[1] <= peaks[2] == peaks[3]
        return allocations.peak, allocations.alive


@pytest.mark.parametrize("kind", ["wan", "taehv"])
@pytest.mark.parametrize("height, width", [(960, 960), (704, 1280), (512, 992)])
def test_the_memory_asked_for_covers_the_peak_and_little_more(kind, height, width):
    vae = full_size(kind)
    asked = chunk_memory(vae, torch.empty(2, 48, 61, height // 16, width // 16, device="meta"))
    peak, _ = fake_decode(vae, height, width)
    assert peak < asked < 1.25 * peak, f"asked for {asked / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB"
    if kind == "wan" and height == width:
        assert 6.5 * GIB < peak < 6.6 * GIB  # the docstring's number


def test_the_cache_can_wait_in_ram(vaes):
    peak, kept = fake_decode(full_size("wan"), 960, 960)
    assert kept > 3 * GIB
    peak_parked, kept = fake_decode(full_size("wan"), 960, 960, park=True)
    assert kept == 0
    assert peak_parked < 4.2 * GIB < 0.65 * peak

    vae, video = vaes["wan"], latents(5)
    decode_one = decoder_for(vae, park=True)
    with torch.no_grad():
        found = torch.cat([vae.process_output(decode_one(piece))[0].movedim(0, -1) for piece in video.split(1, dim=2)])
    assert torch.equal(found, torch.cat(list(decode_chunks(vae, video))))


@pytest.mark.parametrize("missing", [0, 1])
def test_what_is_asked_of_the_memory_manager(vaes, missing, monkeypatch):
    """One latent frame's memory whatever the length; the cache is parked if not even that is free then."""
    vae, video = vaes["wan"], latents(3, batch=2)
    needed = chunk_memory(vae, video)
    assert needed == chunk_memory(vae, video[:1, :, :1]) == 4400 * 64 * 96 * 4
    asked, parked = [], []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, **options: (
        asked.append((models, options["memory_required"])), load(models, **options)))
    monkeypatch.setattr(video_vae, "decoder_for", lambda vae, park: (parked.append(park), decoder_for(vae, park))[1])
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda _: needed - missing)
    list(decode_chunks(vae, video))
    assert asked == [([vae.patcher], needed)]
    assert parked == [False, False], "there is no other memory to park it in"
    monkeypatch.setattr(video_vae.comfy.model_management, "is_device_cpu", lambda _: False)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *_, **__: None)
    list(decode_chunks(vae, video))
    assert parked[2:] == [bool(missing)] * 2
