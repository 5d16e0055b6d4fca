"""Ovi Dataset: which folders it offers, what it refuses and shows, and a run in the real server."""

import os
import re
import shutil
import time

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from devlib.client import RejectedError
from devlib.graphs import executed, forget, loaders, node, text_of
from devlib.weights import TINY
from ovi_native.nodes import training
from ovi_native.nodes.training import OviDataset, clip_folders, clock, contents, folder_path, progress
from ovi_native.ovi_model.text import umt5
from ovi_native.ovi_model.training import cache
from support.clip_files import write_clip
from tiny.video_vae import video_vae

NAME = "meine Clips ü"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's own folders, empty."""
    for name in ("input", "output", "user"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


@pytest.fixture(scope="module")
def encoders(tiny_models, sound_vae):
    path = tiny_models / "text_encoders" / TINY["text_encoder"]
    return {"vae": comfy.sd.VAE(sd=video_vae(0)), "audio_vae": sound_vae, "clip": umt5.load_text_encoder(str(path))}


def run(encoders, **options):
    options = {"folder": NAME, "variant": "960x960_5s", "size": 64, "longest_seconds": 0.4, "caption_prefix": "",
               "caption_dropout": 0.2, **options}
    output = OviDataset.execute(**encoders, **options)
    return *output.args, output.ui.as_dict()["text"][0]


def put(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folders_with_clips_are_offered(folders):
    put(folders / "input", "a.mp4", "clips/a.mp4", "deep/er ü/a.webm", "sounds/a.FLAC", "walks/walk/1.png",
        "walks/walk.txt", "pictures/1.png", "more/pictures/1.png", "texts/a.txt", ".hidden/a.mp4",
        "tabled/captions.csv")
    put(folders / "output", "video/ComfyUI_00001_.mp4")
    (folders / "elsewhere").mkdir()
    put(folders / "elsewhere", "a.mp4")
    (folders / "input" / "link").symlink_to(folders / "elsewhere")
    with open(os.path.join(os.fsencode(folders / "input" / "clips"), b"x"), "wb"):
        pass
    assert clip_folders() == ["video [output]", "clips", "deep/er ü", "sounds", "tabled", "walks"]
    assert OviDataset.define_schema().inputs[0].options == clip_folders()
    assert folder_path("deep/er ü") == folders / "input" / "deep/er ü"
    assert folder_path("video [output]") == folders / "output" / "video"


@pytest.mark.parametrize("name", ["", ".", "..", "../elsewhere", "/etc", "link", "clips/a.mp4", "none", "x\0y",
                                  "video/.. [output]", ". [temp]", 3])
def test_no_name_leaves_the_folders(folders, name):
    put(folders, "elsewhere/a.mp4", "input/clips/a.mp4", "output/video/a.mp4")
    (folders / "input" / "link").symlink_to(folders / "elsewhere")
    with pytest.raises(ValueError, match="must be a folder in ComfyUI's output or input folder"):
        folder_path(name)


def test_every_change_in_a_folder_is_seen(folders):
    put(folders, "input/clips/a.mp4", "input/clips/a.txt", "input/clips/f/1.png")
    place, seen = folders / "input/clips", set()
    for change in (lambda: None, lambda: (place / "a.txt").write_text("longer"), lambda: (place / "f/2.png").touch(),
                   lambda: (place / "f/1.png").unlink(), lambda: os.utime(place / "a.mp4", ns=(1, 1))):
        change()
        seen.add(OviDataset.fingerprint_inputs("clips", vae=None))
    assert len(seen) == 5 and contents(place) in seen


# --- the node ---------------------------------------------------------------------------------------------------------


def test_the_node_gives_a_dataset_and_says_what_it_holds(folders, encoders):
    put(folders, f"input/{NAME}/broken.mp4", f"input/{NAME}/broken.txt")
    write_clip(folders / "input" / NAME / "a.mp4", 1, 9)
    dataset, text, shown = run(encoders)
    assert len(dataset) == 1 and dataset.caption_dropout == 0.2
    assert dataset.empty_text.parent == folders / "user/__ovi_native/training_cache" == cache.default_folder()
    assert shown.startswith("⚠ Left out: broken: broken.mp4 cannot be read")
    for line in ("1 clip as 1 example:", "  1 of 64x64, 9 frames (0.38 s)",
                 "Encoded now: 1 picture, 1 sound, 2 texts."):
        assert line in shown.splitlines() and line in text.splitlines()
    again, text, _ = run(encoders)
    assert "Everything was in the cache already." in text and again.items == dataset.items
    batch = again.draw(2, torch.Generator().manual_seed(0))
    assert batch.video.shape == (2, 48, 3, 4, 4)


def test_what_is_wrong_is_said(folders, encoders):
    put(folders, f"input/{NAME}/broken.mp4", f"input/{NAME}/broken.txt")
    with pytest.raises(ValueError, match=r"holds no clip to train on\. broken: broken\.mp4 cannot be read"):
        run(encoders)
    for options, sentence in (({"size": -1}, "size of 'Ovi Dataset' must be a whole number from 0 to 2048"),
                              ({"longest_seconds": float("nan")}, "longest_seconds of 'Ovi Dataset' must be"),
                              ({"caption_dropout": 1.5}, "caption_dropout of 'Ovi Dataset' must be"),
                              ({"variant": "big"}, "variant of 'Ovi Dataset' must be one of"),
                              ({"vae": encoders["audio_vae"]}, "20 latent channels, but Ovi needs the Wan2.2 VAE")):
        with pytest.raises(ValueError, match=sentence):
            run({**encoders, **{key: options.pop(key) for key in list(options) if key in encoders}}, **options)


def test_a_bar_and_the_time_left_are_shown(monkeypatch):
    now, bars, lines = [100.0], [], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: bars.append((done, total)))
    say = progress(lines.append)
    for done in range(5):
        say("encoding pictures", done, 4)
        now[0] += 65
    say("encoding sounds", 0, 2)
    assert lines == ["Encoding pictures: 1 of 4", "Encoding pictures: 2 of 4, 3:15 left",
                     "Encoding pictures: 3 of 4, 2:10 left", "Encoding pictures: 4 of 4, 1:05 left",
                     "Encoding pictures: 4 of 4", "Encoding sounds: 1 of 2"]
    assert bars[0] == (0, 4) and (4, 4) in bars and bars[-1] == (0, 2)
    assert (clock(7), clock(3723)) == ("0:07", "1:02:03")
    assert training.SHOW_EVERY < 1


# --- in a server ------------------------------------------------------------------------------------------------------


def test_in_a_server(comfy_client, comfy_server):
    place = comfy_server.base / "input" / NAME
    place.mkdir()
    try:
        for seed, name in enumerate(("a b", "ö")):
            write_clip(place / f"{name}.mp4", 100 + seed, 9)  # no other test's, as the server keeps its cache
        (place / "text.mp4").write_text("no video")
        (place / "text.txt").write_text("x")
        assert NAME in str(comfy_client.object_info()["OviDataset"]["input"]["required"]["folder"])
        graph = {name: loaders()[name] for name in ("clip", "vae", "audio_vae")} | {
            "data": node("OviDataset", folder=NAME, vae=["vae", 0], audio_vae=["audio_vae", 0], clip=["clip", 0],
                         variant="960x960_5s", size=64, longest_seconds=0.4, caption_prefix="", caption_dropout=0.1),
            "show": node("PreviewAny", source=["data", 1])}
        first = comfy_client.run(graph)
        assert "2 clips as 2 examples:" in text_of(first, "show") and "⚠ Left out: text:" in text_of(first, "data")
        assert re.search("Encoded now: 2 pictures, 2 sounds, [23] texts", text_of(first, "show"))
        assert "data" not in executed(comfy_client.run(graph))
        forget(comfy_client)
        again = comfy_client.run(graph)
        assert "data" in executed(again) and "Everything was in the cache already." in text_of(again, "show")
        write_clip(place / "c.mp4", 102, 9)
        more = comfy_client.run(graph)
        assert "Encoded now: 1 picture, 1 sound, 1 text." in text_of(more, "show")
        graph["data"]["inputs"]["folder"] = "../models"
        with pytest.raises(RejectedError):
            comfy_client.run(graph)
    finally:
        shutil.rmtree(place)
