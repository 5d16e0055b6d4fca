"""Runs of the real server against each other: same and other seeds and prompts, interruption, memory."""

import re

import numpy as np
import psutil
import pytest
import torch
from devlib import graphs, media
from devlib.client import ComfyClient
from devlib.graphs import change, decode, executed, files, node, run_latents, save_clip, save_latents, text_to_av
from devlib.server import ComfyServer

MEGABYTE = 1 << 20


def one_step(**inputs):
    """One step only, where a change cannot reach the other stream through the model."""
    return change(change(text_to_av(), sampler={"steps": 1}), **inputs)


def assert_same_clip(one, other):
    """Equal sound, and frames up to x264, which does not always encode equal frames to equal bytes in one process."""
    assert np.array_equal(one.sound, other.sound)
    assert np.abs(one.frames.astype(int) - other.frames).mean() < 3


# --- what changes a clip ----------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_clip_after_everything_was_forgotten(comfy_client):
    graph = text_to_av()
    latents = run_latents(comfy_client, graph)
    clips = []
    for _ in range(2):
        graphs.forget(comfy_client)
        run = comfy_client.run(save_clip(decode(graph)))
        assert {"model", "sampler", "decode"} <= set(executed(run))
        clips.append(media.read_media(files(comfy_client, run, "save")[0]))
    assert_same_clip(*clips)
    graphs.assert_equal(run_latents(comfy_client, change(graph, latent={"seconds": 1.5}), fresh=True), latents)


@pytest.mark.slow
def test_same_seed_gives_the_same_latents_in_another_process(comfy_client, comfy_server, tiny_models, tmp_path):
    graph = text_to_av()
    latents = run_latents(comfy_client, graph)
    clip = files(comfy_client, comfy_client.run(save_clip(decode(graph))), "save")[0]
    server = ComfyServer(tmp_path, found=comfy_server.comfyui, models=tiny_models)
    with server, ComfyClient(server.url) as client:
        graphs.assert_equal(run_latents(client, graph, fresh=True), latents)
        again = files(client, client.run(save_clip(decode(graph))), "save")[0]
    assert_same_clip(media.read_media(clip), media.read_media(again))


CHANGES = [  # what is changed, and whether video and audio differ then
    ({"sampler": {"seed": 8}}, True, True),
    ({"sampler": {"video_guidance": 2.0}}, True, False),
    ({"sampler": {"audio_guidance": 2.0}}, False, True),
    ({"sampler": {"skip_layer": -1}}, True, True),
    ({"sampler": {"steps": 2}}, True, True),
    ({"prompt": {"audio_caption": "a loud crowd"}}, True, True),
    ({"prompt": {"audio_negative": "a loud crowd"}}, True, True),  # the towers read each other within the pass
    ({"prompt": {"video_negative": "a loud crowd"}}, True, True),
    ({"prompt": {"variant": "720x720_5s"}}, True, True),  # another caption style
    ({"latent": {"variant": "720x720_5s"}}, False, False),  # with a size of its own, only advice
]


@pytest.mark.parametrize("other, video, audio", CHANGES, ids=lambda value: str(value) if value in (True, False) else
                         " ".join(f"{node}.{name}" for node, inputs in value.items() for name in inputs))
def test_each_setting_changes_what_it_should(comfy_client, other, video, audio):
    truth, found = run_latents(comfy_client, one_step()), run_latents(comfy_client, one_step(**other))
    for stream, changes in (("video", video), ("audio", audio)):
        before, after = getattr(truth, stream), getattr(found, stream)
        if changes:
            assert float((before - after).abs().max()) > 0.05, f"{stream} stayed the same"
        else:
            assert torch.equal(before, after), f"{stream} changed"


@pytest.mark.parametrize("setting", [{"shift": 9.0}, {"solver": "dpm++"}, {"solver": "euler"}, {"denoise": 0.5}])
def test_schedule_and_solver_matter_from_two_steps_on(comfy_client, setting):
    truth = run_latents(comfy_client, text_to_av())
    found = run_latents(comfy_client, change(text_to_av(), sampler=setting))
    assert float((truth.video - found.video).abs().max()) > 0.02
    assert float((truth.audio - found.audio).abs().max()) > 0.02


# --- interruption -----------------------------------------------------------------------------------------------------


def test_interrupt_stops_within_a_step_and_the_next_run_is_unharmed(comfy_client, comfy_server):
    graph = change(graphs.image_to_av(), sampler={"seed": 99})
    truth = run_latents(comfy_client, graph)
    slow = change(graph, sampler={"steps": 173}, latent={"width": 352, "height": 256, "frames": 49})
    seen = []

    def stop_after_two(kind, data):
        if kind == "progress" and data["node"] == "sampler":
            seen.append(data["value"])
            if len(seen) == 2:
                comfy_client.interrupt()

    run = comfy_client.run(save_latents(slow), on_event=stop_after_two)
    assert run.status == "interrupted"
    assert run.of("execution_interrupted")[0]["node_id"] == "sampler"
    assert "video_latent" not in {output.node for output in run.outputs}
    # The third may have ended while the request was on its way. The server's progress bar counts what it really did.
    done = [int(step) for step in re.findall(r"(\d+)/173 ", comfy_server.log_text())]
    assert seen[-1] <= 3 and 2 <= max(done) <= 3
    graphs.assert_equal(run_latents(comfy_client, change(graph, latent={"seconds": 2.0}), fresh=True), truth)


def test_interrupted_picture_run_leaves_no_trace_in_the_next(comfy_client):
    """The first frame's mask and normalisation belong to one run only."""
    truth = run_latents(comfy_client, text_to_av())

    def stop(kind, data):
        if kind == "progress" and data["node"] == "sampler":
            comfy_client.interrupt()

    run = comfy_client.run(save_latents(change(graphs.image_to_av(), sampler={"steps": 200})), on_event=stop)
    assert run.status == "interrupted"
    graphs.assert_equal(run_latents(comfy_client, change(text_to_av(), latent={"seconds": 2.5}), fresh=True), truth)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_over_20_runs(comfy_client, comfy_server):
    """New noise each time and models loaded again every fifth time: a kept model is 25 MB, a kept VAE 23 MB."""
    graph = decode(one_step(latent={"width": 32, "height": 32, "frames": 5}))
    graph["end"] = node("PreviewAny", source=["decode", 1])
    process = psutil.Process(comfy_server.pid)
    used = []
    for seed in range(20):
        if seed % 5 == 0:
            graphs.forget(comfy_client)
        run = comfy_client.run(change(graph, sampler={"seed": seed}))
        assert {"sampler", "decode"} <= set(executed(run))
        used.append(process.memory_info().rss / MEGABYTE)
    drift = max(used[-3:]) - max(used[2:5])
    assert drift < 30, f"grew by {drift:.0f} MB: {[round(u) for u in used]}"
