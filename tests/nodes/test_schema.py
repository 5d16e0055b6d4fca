"""The surface people's saved workflows depend on: ids, inputs, defaults, tooltips, help pages, and no side effects."""

import asyncio
import copy
import re
from pathlib import Path

import comfy.sd
import ovi_native
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import io
from ovi_native.nodes import NODES, OviExtension
from ovi_native.nodes.latents import OviEmptyLatent, OviFirstFrame
from ovi_native.nodes.sampling import OviAudioGuidance, OviGuider, OviSampler, OviSkipLayer
from tiny.inputs import conditioning
from tiny.models import tiny_model
from tiny.video_vae import video_vae

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = [node.GET_SCHEMA() for node in NODES]
INPUTS = [pytest.param(schema, item, id=f"{schema.node_id}-{item.id}") for schema in SCHEMAS for item in schema.inputs]
NUMBERS = [param for param in INPUTS if param.values[1].io_type in ("INT", "FLOAT")]

REQUIRED = "(required, without a default)"
SOME_TEXT = "(some text)"
VARIANT = "960x960_5s"

# Once released, nothing here may be renamed, reordered or removed; new inputs go last, optional, with a default.
FROZEN = {
    "OviModelLoader": ("Load Ovi Model", "Ovi/loaders", {
        "model_name": REQUIRED, "weight_dtype": "default", "second_file": "automatic", "variant": "automatic",
    }, ["MODEL MODEL", "COMBO variant"]),
    "OviTextEncoderLoader": ("Load Ovi Text Encoder", "Ovi/loaders", {
        "text_encoder_name": REQUIRED, "tokenizer_name": "automatic",
    }, ["CLIP CLIP"]),
    "OviAudioVAELoader": ("Load Ovi Audio VAE", "Ovi/loaders", {
        "vae_name": REQUIRED, "vocoder_name": REQUIRED,
    }, ["VAE VAE"]),
    "OviPrompt": ("Ovi Prompt", "Ovi/conditioning", {
        "clip": REQUIRED, "scene": SOME_TEXT, "variant": VARIANT, "audio_caption": "",
        "video_negative": "jitter, bad hands, blur, distortion", "audio_negative": "robotic, muffled, echo, distorted",
    }, ["CONDITIONING positive", "CONDITIONING negative", "STRING text"]),
    "OviSkipLayer": ("Ovi Skip Layer", "Ovi/conditioning", {
        "conditioning": REQUIRED, "skip_layer": 11,
    }, ["CONDITIONING CONDITIONING"]),
    "OviEmptyLatent": ("Ovi Empty Latent", "Ovi/latent", {
        "variant": VARIANT, "aspect": "16:9 wide", "width": 1280, "height": 704, "seconds": 0.0, "frames": 0,
        "batch_size": 1,
    }, ["LATENT LATENT", "INT width", "INT height", "INT frames", "FLOAT fps"]),
    "OviFirstFrame": ("Ovi First Frame", "Ovi/latent", {
        "vae": REQUIRED, "image": REQUIRED, "variant": VARIANT, "resize": "reference", "latent": REQUIRED,
    }, ["LATENT LATENT", "INT width", "INT height", "IMAGE image", "FLOAT fps"]),
    "OviSampler": ("Ovi Sampler", "Ovi/sampling", {
        "model": REQUIRED, "positive": REQUIRED, "negative": REQUIRED, "latent": REQUIRED, "seed": 0, "steps": 50,
        "solver": "unipc", "shift": 5.0, "video_guidance": 4.0, "audio_guidance": 3.0, "skip_layer": 11, "denoise": 1.0,
    }, ["LATENT latent"]),
    "OviGuider": ("Ovi Guider", "Ovi/sampling", {
        "model": REQUIRED, "positive": REQUIRED, "negative": REQUIRED, "video_guidance": 4.0, "audio_guidance": 3.0,
        "skip_layer": 11,
    }, ["GUIDER GUIDER"]),
    "OviAudioGuidance": ("Ovi Audio Guidance", "Ovi/sampling", {
        "model": REQUIRED, "audio_guidance": 3.0,
    }, ["MODEL MODEL"]),
    "OviSolver": ("Ovi Solver", "Ovi/sampling", {"solver": "unipc"}, ["SAMPLER SAMPLER"]),
    "OviSchedule": ("Ovi Schedule", "Ovi/sampling", {
        "solver": "unipc", "steps": 50, "shift": 5.0, "denoise": 1.0,
    }, ["SIGMAS SIGMAS"]),
    "OviDecode": ("Ovi Decode", "Ovi/latent", {
        "latent": REQUIRED, "video_vae": REQUIRED, "audio_vae": REQUIRED, "tile_size": 0, "tile_frames": 64,
    }, ["IMAGE images", "AUDIO audio", "FLOAT fps"]),
    "OviDecodeVideo": ("Ovi Decode to Video", "Ovi/latent", {
        "latent": REQUIRED, "video_vae": REQUIRED, "audio_vae": REQUIRED, "crf": 23.0,
    }, ["VIDEO video"]),
    "OviWeights": ("Ovi Weights", "Ovi/loaders", {"variant": VARIANT, "precision": "bf16"}, []),
    "OviFast": ("Ovi Fast", "Ovi/speed", {"model": REQUIRED, "preset": "balanced"}, ["MODEL MODEL"]),
    "OviAttention": ("Ovi Attention", "Ovi/speed", {"model": REQUIRED, "backend": "auto"}, ["MODEL MODEL"]),
    "OviStepCache": ("Ovi Step Cache", "Ovi/speed", {
        "model": REQUIRED, "video_threshold": 0.1, "audio_threshold": 0.1, "start_percent": 0.15, "end_percent": 0.95,
    }, ["MODEL MODEL"]),
    "OviGuidanceRange": ("Ovi Guidance Range", "Ovi/speed", {
        "model": REQUIRED, "start_percent": 0.0, "end_percent": 0.8,
    }, ["MODEL MODEL"]),
    "OviFitSound": ("Ovi Fit Sound", "Ovi/latent", {
        "audio": REQUIRED, "seconds": 0.0, "frames": 0, "fps": 24.0, "fade": 0.0, "images": REQUIRED,
        "latent": REQUIRED,
    }, ["AUDIO AUDIO", "FLOAT seconds"]),
    "OviFitSoundLatent": ("Ovi Fit Sound Latent", "Ovi/latent", {"latent": REQUIRED}, ["LATENT LATENT"]),
    "OviSaveLatent": ("Ovi Save Latent", "Ovi/latent", {
        "latent": REQUIRED, "filename_prefix": "latents/Ovi",
    }, ["LATENT latent"]),
    "OviLoadLatent": ("Ovi Load Latent", "Ovi/latent", {"latent": REQUIRED}, ["LATENT latent"]),
    "OviSelectClips": ("Ovi Select Clips", "Ovi/latent", {
        "latent": REQUIRED, "first_clip": 0, "clips": 1,
    }, ["LATENT latent"]),
    "OviRepeatClips": ("Ovi Repeat Clips", "Ovi/latent", {"latent": REQUIRED, "amount": 2}, ["LATENT latent"]),
    "OviLoraLoader": ("Load Ovi LoRA", "Ovi/loaders", {
        "model": REQUIRED, "lora_name": REQUIRED, "strength": 1.0, "video": 1.0, "audio": 1.0, "sound_to_picture": 1.0,
        "picture_to_sound": 1.0,
    }, ["MODEL MODEL"]),
    "OviDataset": ("Ovi Dataset", "Ovi/training", {
        "folder": REQUIRED, "vae": REQUIRED, "audio_vae": REQUIRED, "clip": REQUIRED, "variant": VARIANT, "size": 0,
        "longest_seconds": 0.0, "caption_prefix": "", "caption_dropout": 0.1,
    }, ["OVI_DATASET dataset", "STRING report"]),
    "OviTrainLora": ("Ovi Train LoRA", "Ovi/training", {
        "model": REQUIRED, "dataset": REQUIRED, "name": "my_lora", "steps": 1000, "learning_rate": 1e-4,
        "audio_learning_rate": 0.0, "rank": 32, "alpha": 32.0, "towers": "both", "layers": "all", "batch": 1,
        "video_given": 0.0, "audio_given": 0.0, "first_frame": 0.2,
        "distribution": "logit-normal", "shift": 5.0, "video_share": 0.85, "seed": 0, "save_every": 250,
        "sample_every": 0, "resume": True,
    }, ["MODEL MODEL", "STRING lora_name", "STRING report"]),
    "OviVAELoader": ("Load Ovi VAEs", "Ovi/loaders", {
        "video_vae_name": REQUIRED, "audio_vae_name": REQUIRED, "vocoder_name": REQUIRED,
    }, ["VAE video_vae", "VAE audio_vae"]),
}
OPTIONAL = {"OviModelLoader": {"second_file", "variant"}, "OviFirstFrame": {"latent"},
            "OviFitSound": {"images", "latent"},
            "OviPrompt": {"audio_caption", "video_negative", "audio_negative"},
            "OviLoraLoader": {"video", "audio", "sound_to_picture", "picture_to_sound"}}
OPTIONS = {
    ("OviModelLoader", "weight_dtype"): [
        "default", "bf16", "fp32", "fp8_scaled", "int8", "mxfp8", "nvfp4"],
    ("OviWeights", "precision"): ["bf16", "fp8"],
    ("OviFast", "preset"): ["balanced", "fast"],
    ("OviAttention", "backend"): [
        "auto", "pytorch", "flash 2", "flash 3", "sage", "sage 3", "xformers", "sub-quadratic"],
    ("OviDataset", "variant"): ["720x720_5s", "960x960_5s", "960x960_10s"],
    ("OviTrainLora", "towers"): ["both", "video", "audio"],
    ("OviTrainLora", "layers"): [
        "all", "attention", "self-attention and text", "self-attention", "text", "fusion", "feed-forward"],
    ("OviTrainLora", "distribution"): ["logit-normal", "uniform"],
    ("OviPrompt", "variant"): ["720x720_5s", "960x960_5s", "960x960_10s"],
    ("OviEmptyLatent", "aspect"): [
        "16:9 wide", "9:16 tall", "1:1 square", "4:3 wide", "3:4 tall", "5:2 ultra-wide", "custom", "custom ratio"],
    ("OviFirstFrame", "resize"): ["reference", "crop", "stretch"],
    ("OviSampler", "solver"): ["unipc", "dpm++", "euler"],
}
OWN_TYPES = {"OVI_DATASET"}  # of what core has none
CORE_TYPES = {"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "AUDIO", "VIDEO", "GUIDER", "SAMPLER",
              "SIGMAS", "INT", "FLOAT", "STRING", "COMBO", "BOOLEAN"}


# --- what is frozen ---------------------------------------------------------------------------------------------------


def test_ids_names_inputs_defaults_and_outputs_are_frozen():
    def default(item):
        value = getattr(item, "default", None)
        if value is None:
            return REQUIRED
        return SOME_TEXT if isinstance(value, str) and len(value) > 100 else value

    found = {
        schema.node_id: (
            schema.display_name, schema.category, {item.id: default(item) for item in schema.inputs},
            [f"{output.io_type} {output.display_name or output.io_type}" for output in schema.outputs])
        for schema in SCHEMAS
    }
    assert list(found) == list(FROZEN)
    for node_id, frozen in FROZEN.items():
        assert found[node_id] == frozen
        assert list(found[node_id][2]) == list(frozen[2]), "the order of the inputs changed"


def test_what_is_optional_is_frozen():
    found = {schema.node_id: {item.id for item in schema.inputs if item.optional} for schema in SCHEMAS}
    assert {node_id: names for node_id, names in found.items() if names} == OPTIONAL


@pytest.mark.parametrize("node_id, name", OPTIONS)
def test_options_are_frozen(node_id, name):
    item, = (item for schema in SCHEMAS for item in schema.inputs if (schema.node_id, item.id) == (node_id, name))
    assert list(item.options) == OPTIONS[node_id, name]


def test_the_server_has_the_same_nodes(object_info):
    ours = {name: info for name, info in object_info.items() if info["python_module"] == "custom_nodes.ovi-native"}
    assert set(ours) == set(FROZEN)
    for node_id, (display_name, category, inputs, _) in FROZEN.items():
        order = ours[node_id]["input_order"]
        assert (ours[node_id]["display_name"], ours[node_id]["category"]) == (display_name, category)
        assert [*order.get("required", []), *order.get("optional", [])] == list(inputs)


# --- what every node must have ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)
def test_node_conventions(schema):
    assert re.fullmatch(r"Ovi[A-Z]\w+", schema.node_id)
    assert re.fullmatch(r"Ovi/(loaders|conditioning|latent|sampling|speed|training)", schema.category)
    assert "Ovi" in schema.display_name
    assert schema.description.endswith(".")
    for item in [*schema.inputs, *schema.outputs]:
        assert item.io_type in CORE_TYPES | OWN_TYPES, f"{item.id} has a type of its own"
    for output in schema.outputs:
        assert output.tooltip and output.tooltip.endswith("."), f"output {output.id} has no tooltip"


@pytest.mark.parametrize("schema, item", INPUTS)
def test_every_input_has_a_tooltip(schema, item):
    assert item.tooltip and len(item.tooltip) > 20 and item.tooltip.rstrip()[-1] in ".)", schema.node_id


@pytest.mark.parametrize("schema, item", NUMBERS)
def test_numbers_have_bounds_and_say_them(schema, item):
    assert item.min is not None and item.max is not None and item.min <= item.default <= item.max
    if item.io_type == "FLOAT":
        assert item.step, "without one the front end takes 0.1 and rounds"
    said = re.search(r"\d", item.tooltip) or item.id == "seed"
    assert said, f"the tooltip of {schema.node_id}.{item.id} names no number"


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)
def test_help_page_names_every_input(schema):
    page = (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text("utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    missing = [item.id for item in schema.inputs if not re.search(rf"\b{item.id}\b", page)]
    assert not missing, f"{schema.node_id}.md does not mention {missing}"


def test_help_pages_are_for_nodes_that_exist():
    assert {page.stem for page in (ROOT / "web" / "docs").glob("*.md")} == set(FROZEN)


# --- what search finds ------------------------------------------------------------------------------------------------

SEARCHES = {
    "audio video": {"OviSampler", "OviModelLoader", "OviEmptyLatent", "OviVAELoader", "OviDecode", "OviDecodeVideo"},
    "video with sound": {"OviSampler", "OviModelLoader"},
    "text to video": {"OviSampler", "OviPrompt", "OviEmptyLatent", "OviModelLoader"},
    "image to video": {"OviSampler", "OviFirstFrame"},
    "t2v": {"OviEmptyLatent"}, "i2v": {"OviFirstFrame"},
    "veo": {"OviSampler"}, "talking": {"OviSampler", "OviPrompt", "OviFirstFrame"},
    "speech": {"OviSampler", "OviPrompt"}, "lip sync": {"OviSampler", "OviPrompt", "OviFirstFrame"},
    "mp4": {"OviDecodeVideo"}, "vocoder": {"OviVAELoader", "OviAudioVAELoader"},
    "mmaudio": {"OviVAELoader", "OviAudioVAELoader"}, "umt5": {"OviTextEncoderLoader"},
    "aspect ratio": {"OviEmptyLatent"}, "teacache": {"OviFast", "OviStepCache"}, "sage attention": {"OviAttention"},
    "download": {"OviWeights"}, "lora": {"OviLoraLoader", "OviTrainLora"}, "training": {"OviDataset", "OviTrainLora"},
    "trim audio": {"OviFitSound", "OviFitSoundLatent"},
}
SOUND = {"OviSampler", "OviPrompt", "OviAudioVAELoader", "OviFitSound", "OviAudioGuidance"}


def found_by(query, schemas):
    """Nodes with the query in their name, title or one alias: what the search puts before its approximate finds."""
    return {schema.node_id for schema in schemas if any(
        query in text.lower() for text in (schema.node_id, schema.display_name, *schema.search_aliases))}


@pytest.mark.parametrize("query", SEARCHES)
def test_search_leads_to_the_right_nodes(query):
    assert found_by(query, SCHEMAS) == SEARCHES[query]


def test_every_node_has_aliases_of_its_own(object_info):
    assert found_by("sound", SCHEMAS) >= SOUND
    for schema in SCHEMAS:
        aliases = schema.search_aliases
        assert len(set(aliases)) == len(aliases) >= 2
        assert all(alias == alias.lower().strip() and alias not in schema.display_name.lower() for alias in aliases)
        assert object_info[schema.node_id]["search_aliases"] == aliases


# --- the entry point --------------------------------------------------------------------------------------------------


def test_entry_point_is_v3_only(monkeypatch):
    import comfyui_version

    assert not hasattr(ovi_native, "NODE_CLASS_MAPPINGS")  # with it ComfyUI would never call comfy_entrypoint
    assert (ROOT / ovi_native.WEB_DIRECTORY).is_dir()
    extension = asyncio.run(ovi_native.comfy_entrypoint())
    assert isinstance(extension, OviExtension)
    assert asyncio.run(extension.get_node_list()) == NODES
    assert all(issubclass(node, io.ComfyNode) for node in NODES)

    monkeypatch.setattr(comfyui_version, "__version__", "0.29.3")
    with pytest.raises(ImportError, match=r"needs ComfyUI 0\.30\.0 or newer, but this is 0\.29\.3\. Update ComfyUI"):
        asyncio.run(ovi_native.comfy_entrypoint())


@pytest.mark.parametrize("version", ["0.3.75", "0.29.9", "v0.29.9", "0.29", "0"])
def test_old_comfyui_is_refused(version):
    with pytest.raises(ImportError, match=rf"this is {re.escape(version)}\. Update ComfyUI"):
        ovi_native.check_comfyui(version)


@pytest.mark.parametrize("version", ["0.30.0", "0.30.1", "0.100.0", "1.0.0", "0.30", "v0.30.0", "0.30.0rc1"])
def test_newer_comfyui_is_accepted(version):
    ovi_native.check_comfyui(version)


# --- inputs are never changed -----------------------------------------------------------------------------------------


def snapshot(value):
    """A deep copy that can be compared: tensors to nested lists with their identity kept apart."""
    if isinstance(value, NestedTensor):
        return ("nested", [snapshot(stream) for stream in value.unbind()])
    if torch.is_tensor(value):
        return ("tensor", value.dtype, value.tolist())
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [snapshot(item) for item in value]
    return copy.deepcopy(value) if isinstance(value, str | int | float | None) else id(value)


def model_state(model):
    """What a node could change on a MODEL."""
    weights = sum(float(value.double().sum()) for value in model.model.state_dict().values())
    return snapshot([model.model_options, model.patches, model.object_patches, model.patches_uuid, weights])


@pytest.fixture(scope="module")
def parts():
    """Everything a sampler takes, with a picture as first frame."""
    torch.manual_seed(0)
    vae = comfy.sd.VAE(sd=video_vae(0))
    latent = OviEmptyLatent.execute("960x960_5s", "custom", 64, 64, 0.0, 5, 1).args[0]
    return {
        "model": tiny_model(), "vae": vae, "latent": latent, "image": torch.rand(1, 70, 90, 3),
        "positive": conditioning(seed=1), "negative": conditioning(seed=2, audio_tokens=5),
    }


def test_first_frame_changes_no_input(parts):
    image, latent = parts["image"], parts["latent"]
    before = snapshot([image, latent])
    out = OviFirstFrame.execute(parts["vae"], image, "960x960_5s", "crop", latent).args[0]
    assert snapshot([image, latent]) == before
    assert out["samples"].unbind()[0][:, :, 0].any() and out is not latent


def test_skip_layer_changes_no_input(parts):
    before = snapshot(parts["negative"])
    out = OviSkipLayer.execute(parts["negative"], 1).args[0]
    assert snapshot(parts["negative"]) == before
    assert snapshot(out) != before


def test_guidance_nodes_change_no_input(parts):
    model, conds = parts["model"], [parts["positive"], parts["negative"]]
    before = model_state(model), snapshot(conds)
    patched = OviAudioGuidance.execute(model, 2.0).args[0]
    OviGuider.execute(model, *conds, 4.0, 3.0, 1)
    assert (model_state(model), snapshot(conds)) == before
    assert model_state(patched) != before[0]


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_sampler_changes_no_input(parts, solver):
    latent = OviFirstFrame.execute(parts["vae"], parts["image"], "960x960_5s", "crop", parts["latent"]).args[0]
    model, conds = parts["model"], [parts["positive"], parts["negative"]]
    before = model_state(model), snapshot([conds, latent])
    out = OviSampler.execute(model, *conds, latent, 1, 2, solver, 5.0, 4.0, 3.0, 1, 1.0).args[0]
    assert (model_state(model), snapshot([conds, latent])) == before
    assert out is not latent and not torch.equal(out["samples"].unbind()[0], latent["samples"].unbind()[0])
