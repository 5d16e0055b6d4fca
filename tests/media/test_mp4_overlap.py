"""Encoding runs beside decoding: really at the same time, never far behind, and nothing outlives a failure."""

import threading
import time

import av
import numpy as np
import pytest
import torch
from ovi_native.ovi_model.media import mp4
from ovi_native.ovi_model.media.mp4 import CHUNKS_AHEAD, fetch_bytes, write_mp4

PATIENCE_S = 30  # how long one side waits for the other before a test fails
SILENCE = torch.zeros(1, 100_000)


def chunk(frames: int = 4, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(frames))


def encoder_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ovi-mp4")]


@pytest.fixture
def before_adding(monkeypatch):
    """Lets a test do something in the encoder's thread before each chunk is encoded (by the real thing)."""
    add = mp4._Clip.add

    def install(action) -> None:
        def wrapped(self, fetch):
            action()
            add(self, fetch)

        monkeypatch.setattr(mp4._Clip, "add", wrapped)

    return install


def test_a_chunk_is_encoded_while_the_next_is_made(before_adding):
    """Each encoding waits until the next chunk has been asked for; one after the other, it would wait in vain."""
    asked, met = threading.Semaphore(0), []
    before_adding(lambda: met.append(asked.acquire(timeout=PATIENCE_S)))

    def chunks():
        for _ in range(5):
            yield chunk()
            asked.release()

    write_mp4(chunks(), 24, SILENCE, 16_000, 23.0)
    assert met == [True] * 5


def test_the_encoder_is_never_far_behind(before_adding):
    """A slow encoder: the chunks made wait at CHUNKS_AHEAD before it, and no sooner."""
    made, behind = [], []

    def wait_for_the_others():
        expected = min(12, len(behind) + CHUNKS_AHEAD + 1)
        deadline = time.monotonic() + PATIENCE_S
        while len(made) < expected and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # for one too many, if it comes
        behind.append(len(made) - len(behind))

    before_adding(wait_for_the_others)

    def chunks():
        for i in range(12):
            made.append(i)
            yield chunk()

    write_mp4(chunks(), 24, SILENCE, 16_000, 23.0)
    assert behind == [CHUNKS_AHEAD + 1] * (12 - CHUNKS_AHEAD) + list(range(CHUNKS_AHEAD, 0, -1))


@pytest.mark.parametrize("good, bad", [(0, 100), (5, 100), (5, 1)])
def test_an_error_of_the_encoder_is_the_caller_s_and_stops_the_decoder(good, bad):
    """A real one: odd heights are refused before x264 opens; later, a colour is missing."""
    made = []

    def chunks():
        for i in range(good + bad):
            made.append(i)
            yield chunk(height=63) if not good else chunk() if i < good else chunk()[..., :2]

    with pytest.raises((av.error.FFmpegError, ValueError)):
        write_mp4(chunks(), 24, SILENCE, 16_000, 23.0)
    assert len(made) <= good + CHUNKS_AHEAD + 2
    assert encoder_threads() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_decoder_waits_for_the_encoder_and_leaves_no_thread(before_adding, error):
    """Raised while a chunk is being encoded and another waits: that one is finished, the file closed, no more done."""
    encoding, leave, events = threading.Event(), threading.Event(), []

    def hold():
        encoding.set()
        leave.wait(PATIENCE_S)
        events.append("encoded")

    before_adding(hold)

    def chunks():
        yield chunk()
        yield chunk()
        assert encoding.wait(PATIENCE_S)
        threading.Timer(0.05, leave.set).start()
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        write_mp4(chunks(), 24, SILENCE, 16_000, 23.0)
    assert events == ["encoded"] and encoder_threads() == []


def test_a_finished_file_leaves_no_thread():
    write_mp4(iter([chunk(1), chunk(4)]), 24, SILENCE, 16_000, 23.0)
    assert encoder_threads() == []


def core_s(picture: torch.Tensor) -> np.ndarray:
    """The bytes of a picture, as `VideoFromComponents.save_to` of core makes them."""
    return (picture * 255).clamp(0, 255).byte().cpu().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels_first", [False, True])
def test_bytes_are_core_s(dtype, channels_first):
    """Every whole 255th and its neighbours, what lies between and beyond; in either order in memory."""
    steps = torch.arange(256, dtype=torch.float32) / 255
    values = torch.cat([steps, steps.nextafter(torch.tensor(2.0)), steps.nextafter(torch.tensor(-1.0)),
                        torch.linspace(-0.5, 1.5, 4_608 - 768)]).to(dtype)
    frames = values.view(2, 3, 24, 32) if channels_first else values.view(2, 24, 32, 3)
    frames = frames.movedim(1, -1) if channels_first else frames
    before = frames.clone()
    found = fetch_bytes(frames)()
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.array_equal(found, np.stack([core_s(picture) for picture in frames]))
    assert torch.equal(frames, before), "the caller's frames were changed"
