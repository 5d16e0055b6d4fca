"""Memory that runs out while decoding: the same frames in less memory, then tiles, and a word on the node each time."""

import gc
import weakref

import comfy.model_management
import comfy.sd
import pytest
import torch
from ovi_native.ovi_model.media.video_vae import chunk_memory, decode_chunks
from support.decode_faults import short_of_memory
from tiny import wan_vae
from tiny.video_vae import video_vae
from tiny.wan_vae import latents

SAME = "from frame {} on, decoding used less of it and took longer. The frames are the same."
TILES = "from frame {} on, frames were decoded in tiles of {} pixels"


@pytest.fixture(scope="module")
def vae() -> comfy.sd.VAE:
    return wan_vae.small_vae()


@pytest.mark.parametrize("call", [0, 1, 2, 4, 7])
def test_the_same_frames_in_less_memory(vae, call):
    """Wherever it happens, in the first clip or in the second, no frame is lost, repeated or changed by a bit."""
    video, said = latents(5, batch=2), []
    truth = list(decode_chunks(vae, video))
    with short_of_memory(vae, call) as calls:
        found = list(decode_chunks(vae, video, said.append))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    again = call % 5  # pieces of this clip that were handed out already
    assert len(calls) == 10 + 1 + again
    frames = sum(len(piece) for piece in truth[:call])
    assert said == ["Memory ran out: " + SAME.format(frames + 1)]


def test_tiles_are_core_s_in_space_and_have_no_seam_in_time(vae):
    """Against core's tiled decoding of whole clips; frames handed out before stay as they were."""
    video, said = latents(4, batch=2, height=40, width=6), []
    whole = torch.cat(list(decode_chunks(vae, video)))
    with short_of_memory(vae, 2, 4):  # the third piece; once more, when the clip is decoded again
        found = torch.cat(list(decode_chunks(vae, video, said.append)))
    with torch.inference_mode():
        tiled = vae.decode_tiled(video, tile_x=32, tile_y=32, overlap=8, tile_t=999, overlap_t=1).flatten(0, 1)
    assert torch.equal(found[:5], whole[:5])
    torch.testing.assert_close(found[5:], tiled[5:], rtol=0, atol=1e-5)
    assert float((found[5:] - whole[5:]).abs().max()) > 1e-3, "the control: tiles do differ"
    assert [said[0].endswith(SAME.format(6)), TILES.format(6, 512) in said[1], len(said)] == [True, True, 2]


def test_smaller_tiles_and_at_last_the_error(vae):
    video, said = latents(2), []
    with short_of_memory(vae, 0, 1, 2):
        found = torch.cat(list(decode_chunks(vae, video, said.append)))
    assert torch.equal(found, torch.cat(list(decode_chunks(vae, video)))), "it fits into one tile"
    assert len(said) == 3 and TILES.format(1, 256) in said[2]
    with short_of_memory(vae, 0, 1, 2, 3) as calls, pytest.raises(torch.OutOfMemoryError):
        list(decode_chunks(vae, video))
    assert len(calls) == 4


def test_an_error_of_the_device_that_says_so_counts_too(vae):
    """ROCm and some drivers report it as a general error of the accelerator; others of that kind are raised."""
    with short_of_memory(vae, 1, error=comfy.model_management.ACCELERATOR_ERROR):
        assert len(list(decode_chunks(vae, latents(2)))) == 2

    def broken(_):
        raise comfy.model_management.ACCELERATOR_ERROR("illegal instruction")

    with short_of_memory(vae, 1, error=broken) as calls, pytest.raises(RuntimeError, match="illegal instruction"):
        list(decode_chunks(vae, latents(2)))
    assert len(calls) == 2


def test_other_errors_are_not_tried_again(vae):
    with short_of_memory(vae, 1, error=ValueError) as calls, pytest.raises(ValueError, match="out of memory"):
        list(decode_chunks(vae, latents(3)))
    assert len(calls) == 2


def test_what_the_failed_decoder_held_is_free_before_the_next_try(vae):
    cache, held, alive = [], [], []

    def start(_, __, kwargs):
        gc.disable()  # reference counting alone has to do
        alive.append(sum(tensor() is not None for tensor in held))
        cache.append(kwargs["feat_cache"])

    def note(*_):
        held[:] = [weakref.ref(tensor) for tensor in cache.pop() if torch.is_tensor(tensor)]

    decoder = vae.first_stage_model.decoder
    hooks = decoder.register_forward_pre_hook(start, with_kwargs=True), decoder.head[1].register_forward_pre_hook(note)
    try:
        with short_of_memory(vae, 2):
            list(decode_chunks(vae, latents(3)))
    finally:
        for hook in hooks:
            hook.remove()
        gc.enable()
    assert alive[0] == 0 and min(alive[1:3]) > 10, "the control: what the decoder remembers does live on"
    assert alive[3] == 0


def test_what_is_asked_of_the_memory_manager(vae, monkeypatch):
    """Other models make room before each try; tiles ask for what a tile needs."""
    video, asked = latents(2, height=40, width=40), []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models, **options: (
        asked.append(options["memory_required"]), load(models, **options)))
    with short_of_memory(vae, 0, 1, 2):
        list(decode_chunks(vae, video))
    whole = chunk_memory(vae, video)
    assert asked == [whole, whole, whole * 32 * 32 // 1600, whole * 16 * 16 // 1600]


def test_interruption_is_honoured_while_frames_are_made_again():
    """The pieces before the one that failed are not handed out again; core's layers ask while they are made."""
    vae = comfy.sd.VAE(sd=video_vae(0))
    layer = vae.first_stage_model.decoder[-1]
    pieces = decode_chunks(vae, latents(4))
    with short_of_memory(vae, 3, layer=layer) as calls:
        for _ in range(3):
            next(pieces)
        hook = layer.register_forward_hook(lambda *_: comfy.model_management.interrupt_current_processing())
        try:
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                next(pieces)
        finally:
            hook.remove()
    assert len(calls) == 5, "the failed one and the first of the new try"


def test_the_tiny_stand_in_decodes_in_tiles_as_well():
    vae, said = comfy.sd.VAE(sd=video_vae(0)), []
    video = latents(3, height=40, width=6)
    with short_of_memory(vae, 0, 1, layer=vae.first_stage_model.decoder[0]):
        found = torch.cat(list(decode_chunks(vae, video, said.append)))
    whole = torch.cat(list(decode_chunks(vae, video)))
    assert found.shape == whole.shape and len(said) == 2
    assert float((found - whole).abs().mean()) < 0.02
