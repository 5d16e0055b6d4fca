"""Joint latents saved and loaded, clips of a batch taken and repeated: the nodes, the files, and the real server."""

import json
import os

import folder_paths
import pytest
import torch
from comfy.cli_args import args
from comfy.nested_tensor import NestedTensor
from comfy_extras.nodes_custom_sampler import RandomNoise
from devlib import graphs
from devlib.graphs import change, node, save_latents
from nodes import LatentFromBatch, RepeatLatentBatch
from ovi_native.nodes import clips
from ovi_native.nodes.clips import OviLoadLatent, OviRepeatClips, OviSaveLatent, OviSelectClips
from ovi_native.ovi_model.ovi import latents
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.compare import assert_pair_equal
from tiny.inputs import first_frame_mask, joint

NAME = f"Ovi_00001_{latents.ENDING}"


@pytest.fixture
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder, empty."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "output").mkdir()
    (tmp_path / "input").mkdir()
    return tmp_path / "output"


def full(batch=2):
    """A LATENT with all it can have: content, per-clip masks, numbers, variant."""
    samples = joint(batch=batch, seed=1)
    mask = first_frame_mask(samples)
    mask.unbind()[0][-1] = 1
    return {"samples": samples, "noise_mask": mask, "batch_index": [3, 5][:batch], "ovi_variant": "960x960_10s"}


def assert_same_latent(found, truth):
    assert set(found) == set(truth)
    for key, value in truth.items():
        if isinstance(value, NestedTensor):
            assert_pair_equal(found[key], value)
        elif torch.is_tensor(value):
            assert torch.equal(found[key], value)
        else:
            assert found[key] == value


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [
    lambda _: None, lambda latent: latent.pop("noise_mask"), lambda latent: latent.pop("ovi_variant"),
    lambda latent: latent.update(noise_mask=torch.rand(1, 4, 6))])
def test_what_was_saved_is_loaded_bit_for_bit(output, dtype, change):
    latent = full()
    latent["samples"] = latent["samples"].to(dtype)
    change(latent)
    saved = OviSaveLatent.execute(latent, "latents/Ovi")
    assert saved.args[0] is latent
    name, = OviLoadLatent.define_schema().inputs[0].options
    assert name == f"latents/{NAME} [output]"
    loaded = OviLoadLatent.execute(name)
    assert_same_latent(loaded.args[0], latent)
    assert loaded.args[0]["samples"].dtype == dtype
    assert "2 clips, 96x64, 9 frames = 0.38 s" in loaded.ui.as_dict()["text"][0]
    (output / "latents" / NAME).unlink()
    assert loaded.args[0]["samples"].unbind()[0].isfinite().all()  # not mapped onto the file


@pytest.mark.usefixtures("output")
def test_streams_that_are_views_of_one_tensor_are_saved():
    packed = torch.rand(1, 1, 48 * 24 + 20 * 5)
    mask = torch.ones(1, 1, 5)
    latent = {"samples": NestedTensor((packed[..., :48 * 24].view(1, 48, 1, 4, 6),
                                       packed[..., 48 * 24:].view(1, 20, 5))),
              "noise_mask": NestedTensor((mask.view(1, 1, 5, 1, 1).expand(1, 1, 5, 4, 6)[:, :, :1], mask))}
    OviSaveLatent.execute(latent, "x")
    assert_same_latent(OviLoadLatent.execute(f"x_00001_{latents.ENDING} [output]").args[0], latent)


def test_numbers_go_on_and_nothing_is_left_behind(output):
    for _ in range(3):
        OviSaveLatent.execute(full(), "Ovi")
    (output / f".Ovi_00004_{latents.ENDING}.99999999.part").write_bytes(b"of a killed run")
    OviSaveLatent.execute(full(), "Ovi")
    assert sorted(path.name for path in output.iterdir()) == [NAME.replace("1", str(i)) for i in range(1, 5)]


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/tmp/x", "", ".", "..", "a/..", "x\0y"])
def test_no_prefix_leaves_the_output_folder(output, prefix):
    with pytest.raises(ValueError, match="names no file in ComfyUI's output folder"):
        OviSaveLatent.execute(full(), prefix)
    assert not list(output.parent.rglob("*.safetensors"))


def test_a_link_out_of_the_output_folder_is_not_followed(output, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (output / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="names no file"):
        OviSaveLatent.execute(full(), "link/x")


@pytest.mark.usefixtures("output")
@pytest.mark.parametrize("name", ["../secret.latent.safetensors", "/etc/passwd", "../../x [output]"])
def test_no_name_leaves_the_folders(name):
    with pytest.raises(ValueError, match="must be a file of ComfyUI's output or input folder"):
        OviLoadLatent.execute(name)


def test_what_cannot_be_written_is_a_sentence(output):
    (output / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"No folder can be made|could not be written"):
        OviSaveLatent.execute(full(), "file/x")
    with pytest.raises(RuntimeError, match="could not be written"):
        OviSaveLatent.execute(full(), "n" * 250)


def test_what_is_not_finite_is_not_saved(output):
    latent = full()
    latent["samples"].unbind()[1][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        OviSaveLatent.execute(latent, "x")
    assert not list(output.iterdir())


BAD = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "no header": lambda path: path.write_bytes(b"\xff" * 100),
    "page": lambda path: path.write_bytes(b"<!doctype html>" * 10),
    "gone": lambda path: path.unlink(),
}
WRONG = {
    "lacks": lambda t: t.pop("audio"), "joint latent": lambda t: t.update(video=torch.zeros(1, 16, 3, 4, 6)),
    "same number of clips": lambda t: t.update(audio=torch.zeros(1, 20, 15)),
    "may be 0": lambda t: t.update(video=torch.zeros(2, 48, 0, 4, 6)),
    "another kind": lambda t: t.update(audio=torch.zeros(2, 20, 15, dtype=torch.int64)),
    "not finite": lambda t: t["video"].fill_(float("inf")),
    "mask that does not fit": lambda t: t.update(video_noise_mask=torch.ones(2, 1, 3000, 4, 60)),
    "noise mask that does": lambda t: t.pop("video_noise_mask"),
    "mask": lambda t: t.update(video_noise_mask=torch.tensor(1.0)),
}


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD)
def test_damaged_files_are_a_sentence(output, damage):
    OviSaveLatent.execute(full(), "Ovi")
    damage(output / NAME)
    with pytest.raises(RuntimeError, match=r"cannot be read as a latent file|not there any more"):
        OviLoadLatent.execute(f"{NAME} [output]")


@pytest.mark.parametrize("sentence, wrong", WRONG.items(), ids=WRONG)
def test_files_of_something_else_are_a_sentence(output, sentence, wrong):
    OviSaveLatent.execute(full(), "Ovi")
    tensors = load_file(output / NAME)
    wrong(tensors)
    save_file(tensors, output / NAME)
    with pytest.raises(RuntimeError, match=sentence):
        OviLoadLatent.execute(f"{NAME} [output]")


@pytest.mark.parametrize("index", ["[1]", "x", "[" * 100_000, '["a", 1]', "[-1, 0]", "[1, 99999999999]"])
def test_a_wrong_batch_index_is_a_sentence(output, index):
    OviSaveLatent.execute(full(), "Ovi")
    save_file(load_file(output / NAME), output / NAME, {"batch_index": index})
    with pytest.raises(RuntimeError, match="batch_index that does not fit its 2 clips"):
        OviLoadLatent.execute(f"{NAME} [output]")


def test_a_file_replaced_under_its_name_has_another_fingerprint(output):
    OviSaveLatent.execute(full(), "Ovi")
    path, name = output / NAME, f"{NAME} [output]"
    before, times = OviLoadLatent.fingerprint_inputs(name), path.stat()
    assert OviLoadLatent.fingerprint_inputs(name) == before
    tensors = load_file(path)
    tensors["video"] += 1
    save_file(tensors, path, {"ovi_latent": "1"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert OviLoadLatent.fingerprint_inputs(name) != before


def test_names_that_are_no_text_are_not_listed(output):
    for name in (b"good.latent.safetensors", b"bad\xff.latent.safetensors", b".x.latent.safetensors", b"x.safetensors"):
        with open(os.path.join(os.fsencode(output), name), "wb"):
            pass
    assert clips.latent_files() == ["good.latent.safetensors [output]"]


# --- clips ------------------------------------------------------------------------------------------------------------


def numbered(batch, mask_clips=None):
    video = torch.arange(batch).float().view(-1, 1, 1, 1, 1).expand(batch, 48, 3, 4, 6).clone()
    latent = {"samples": NestedTensor((video, video[:, :20, :, 0, 0].clone())), "ovi_variant": "720x720_5s"}
    if mask_clips:
        rows = torch.arange(mask_clips).float()
        latent["noise_mask"] = NestedTensor((rows.view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 4, 6).clone(),
                                             rows.view(-1, 1, 1).expand(-1, 1, 3).clone()))
    return latent


def as_core(cls, method, latent, stream, *arguments):
    """What core's node makes of one stream, in core's four dimensions."""
    plain = {key: value.unbind()[stream].flatten(2)[..., None] if isinstance(value, NestedTensor) else value
             for key, value in latent.items()}
    return getattr(cls(), method)(plain, *arguments)[0]


@pytest.mark.parametrize("first, count", [(0, 1), (1, 2), (2, 1), (-1, 1), (-3, 2), (0, 3)])
@pytest.mark.parametrize("mask_clips", [None, 1, 2, 3])
@pytest.mark.parametrize("index", [None, [4, 4, 9]])
def test_select_is_core_s_on_each_stream(first, count, mask_clips, index):
    latent = numbered(3, mask_clips) | ({} if index is None else {"batch_index": index})
    found = OviSelectClips.execute(latent, first, count).args[0]
    for stream in (0, 1):
        truth = as_core(LatentFromBatch, "frombatch", latent, stream, first, count)
        assert set(found) == set(truth) and found["batch_index"] == truth["batch_index"]
        for key in {"samples", "noise_mask"} & set(truth):
            assert torch.equal(found[key].unbind()[stream].flatten(2)[..., None], truth[key])


@pytest.mark.parametrize("mask_clips", [None, 1, 3])
@pytest.mark.parametrize("index", [None, [4, 4, 9]])
def test_repeat_is_core_s_on_each_stream(mask_clips, index):
    latent = numbered(3, mask_clips) | ({} if index is None else {"batch_index": index})
    found = OviRepeatClips.execute(latent, 2).args[0]
    for stream in (0, 1):
        truth = as_core(RepeatLatentBatch, "repeat", latent, stream, 2)
        assert set(found) == set(truth) and found.get("batch_index") == truth.get("batch_index")
        for key in {"samples", "noise_mask"} & set(truth):
            assert torch.equal(found[key].unbind()[stream].flatten(2)[..., None], truth[key])


def test_repeat_with_a_mask_of_fewer_clips_serves_them_in_turn():
    mask = OviRepeatClips.execute(numbered(3, 2), 2).args[0]["noise_mask"].unbind()[1]
    assert mask[:, 0, 0].tolist() == [0, 1, 0, 0, 1, 0]


def test_all_that_follow_and_clips_that_are_not_there():
    latent = numbered(3)
    assert OviSelectClips.execute(latent, 1, 0).args[0]["batch_index"] == [1, 2]
    for first, count in ((3, 1), (-4, 1), (2, 2), (0, 4), (0, -1)):
        with pytest.raises(ValueError, match=r"the latent has 3 clips: first_clip goes from 0 to 2"):
            OviSelectClips.execute(latent, first, count)
    with pytest.raises(ValueError, match="1 to 64 times; got 0"):
        OviRepeatClips.execute(latent, 0)


@pytest.mark.usefixtures("output")
@pytest.mark.parametrize("call", [
    lambda latent: OviSelectClips.execute(latent, 0, 1), lambda latent: OviRepeatClips.execute(latent, 2),
    lambda latent: OviSaveLatent.execute(latent, "x")])
@pytest.mark.parametrize("samples", [
    torch.zeros(1, 48, 3, 4, 6), NestedTensor((torch.zeros(1, 48, 3, 4, 6),)),
    NestedTensor((torch.zeros(1, 48, 0, 4, 6), torch.zeros(1, 20, 3))),
    NestedTensor((torch.zeros(2, 48, 1, 4, 6), torch.zeros(1, 20, 3)))])
def test_other_latents_are_refused(call, samples):
    with pytest.raises(ValueError, match=r"'Ovi \w+ \w+' (needs|got) an? (empty )?joint latent"):
        call({"samples": samples})


def test_a_selected_clip_has_the_picture_s_noise_of_its_number():
    """Not the sound's: core draws it otherwise for numbered clips."""
    latent, noise = {"samples": joint(batch=3)}, RandomNoise.execute(1).result[0]
    one = OviSelectClips.execute(latent, 1, 1).args[0]
    assert torch.equal(noise.generate_noise(one).unbind()[0][0], noise.generate_noise(latent).unbind()[0][1])


# --- in the server ----------------------------------------------------------------------------------------------------


def test_save_and_load_in_the_server(comfy_client, comfy_server):
    """A batch of two with a first frame: saved, loaded without a restart, equal to the last bit, decoded."""
    graph = change(graphs.image_to_av(), latent={"batch_size": 2})
    graph["kept"] = node("OviSaveLatent", latent=["sampler", 0], filename_prefix="latents/server")
    run = comfy_client.run(save_latents(graph))
    truth = graphs.Latents(*(graphs.load(graphs.files(comfy_client, run, name)[0])["latent_tensor"]
                             for name in ("video_latent", "audio_latent")))
    output, = (output for output in run.outputs if output.node == "kept")
    name = f"{output.subfolder}/{output.filename} [output]"
    options = comfy_client.object_info()["OviLoadLatent"]["input"]["required"]["latent"]
    assert name in str(options)

    load_graph = {"loaded": node("OviLoadLatent", latent=name)}
    graphs.assert_equal(graphs.run_latents(comfy_client, load_graph, "loaded"), truth)
    with safe_open(output.path(comfy_server.base), "pt") as file:
        metadata = file.metadata()
    assert latents.seeds(metadata["prompt"]) == [7] and metadata["ovi_variant"] == "960x960_5s"
    assert metadata["seconds"] == "0.375"

    one = load_graph | {"one": node("OviSelectClips", latent=["loaded", 0], first_clip=1, clips=1)}
    found = graphs.run_latents(comfy_client, one, "one")
    assert torch.equal(found.video, truth.video[1:]) and torch.equal(found.audio, truth.audio[1:])


def test_repeated_first_frame_is_sampled_in_the_server(comfy_client):
    graph = graphs.image_to_av() | {"twice": node("OviRepeatClips", latent=["first", 0], amount=2)}
    found = graphs.run_latents(comfy_client, change(graph, sampler={"latent": ["twice", 0]}))
    assert found.video.shape[0] == found.audio.shape[0] == 2
    torch.testing.assert_close(found.video[0, :, 0], found.video[1, :, 0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.video[0], found.video[1])


def test_metadata_is_left_out_where_the_user_says_so(output, monkeypatch):
    class Hidden:
        prompt, extra_pnginfo, unique_id = {"1": {"inputs": {"seed": 42}}}, {"workflow": {"a": 1}}, None

    monkeypatch.setattr(OviSaveLatent, "hidden", Hidden)
    for disabled in (False, True):
        monkeypatch.setattr(args, "disable_metadata", disabled)
        OviSaveLatent.execute(full(), f"x{disabled:d}")
        with safe_open(output / f"x{disabled:d}_00001_{latents.ENDING}", "pt") as file:
            found = file.metadata()
        assert found["ovi_variant"] == "960x960_10s" and found["seconds"] == "0.375"
        assert ("prompt" in found, "workflow" in found) == (not disabled, not disabled)
        if not disabled:
            assert json.loads(found["workflow"]) == {"a": 1} and latents.seeds(found["prompt"]) == [42]


