"""LoRA files under every naming in circulation act as under core's names."""

import re

import pytest
import torch
from ovi_native.ovi_model.ovi.lora_keys import apply_lora, group_of, read_lora
from support.loras import EVEN, RANK, assert_same, flat, load, make_lora, matrices, ovi, stock, weights
from tiny.inputs import noise
from tiny.models import tiny_model
from tiny.sizes import Sizes

pytestmark = pytest.mark.usefixtures("either_loading")


@pytest.fixture
def model(either_loading):  # noqa: ARG001 (the state comes first)
    return tiny_model(sizes=Sizes(heads=1, blocks=1))


def diffusers(name: str) -> str:
    """By the table of diffusers' own conversion, written a second time."""
    tower = "audio_model." if name.startswith("audio_model.") else ""
    name = name.removeprefix(tower)
    for core, theirs in (
            (r"self_attn", "attn1"), (r"cross_attn", "attn2"), (r"(attn\d)\.([qkv])$", r"\1.to_\2"),
            (r"(attn\d)\.o$", r"\1.to_out.0"), (r"ffn\.0", "ffn.net.0.proj"), (r"ffn\.2", "ffn.net.2"),
            (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
            (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
            (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
            (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
            (r"^time_projection\.1", "condition_embedder.time_proj"), (r"^head\.head", "proj_out")):
        name = re.sub(core, theirs, name)
    return tower + name


AB, UP_DOWN = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.default.weight", ".lora_B.default.weight")
NAMINGS = {
    "core": (lambda n: f"diffusion_model.{n}", AB),
    "core with Ovi's": (lambda n: f"diffusion_model.{ovi(n)}", UP_DOWN),
    "wrapped checkpoint": (lambda n: f"model.diffusion_model.{ovi(n)}", AB),
    "Ovi": (ovi, AB), "Ovi, up and down": (ovi, UP_DOWN), "bare": (lambda n: n, AB), "DiffSynth": (lambda n: n, PEFT),
    "transformer": (lambda n: f"transformer.{n}", AB), "PEFT": (lambda n: f"base_model.model.{n}", PEFT),
    "PEFT of Ovi": (lambda n: f"base_model.model.{ovi(n)}", (".lora_A.weight", ".lora_B.weight")),
    "PEFT, named": (lambda n: f"base_model.model.{ovi(n)}", (".lora_A.style.weight", ".lora_B.style.weight")),
    "PEFT, no weight": (ovi, (".lora_A", ".lora_B")),
    "diffusers": (lambda n: f"transformer.{diffusers(n)}", AB), "diffusers, bare": (diffusers, AB),
    "diffusers, old": (lambda n: f"unet.{diffusers(n)}".replace(".to_", ".processor.to_"),
                       ("_lora.down.weight", "_lora.up.weight")),
    "kohya": (lambda n: flat("lora_unet_", n), UP_DOWN),
    "kohya of Ovi": (lambda n: flat("lora_unet_", ovi(n)), UP_DOWN),
    "kohya, Wan-Fun": (lambda n: flat("lora_unet__", n), UP_DOWN),
    "kohya of diffusers": (lambda n: flat("lora_unet_", diffusers(n)), UP_DOWN),
    "OneTrainer": (lambda n: flat("lora_transformer_", diffusers(n)), UP_DOWN),
    "LyCORIS": (lambda n: flat("lycoris_", n), UP_DOWN), "module": (lambda n: f"module.{ovi(n)}", AB),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_acts_as_core_names_do(model, naming):
    rename, (down, up) = NAMINGS[naming]
    ours = make_lora(model, "", rename, down, up)
    truth = make_lora(model, "", lambda name: f"diffusion_model.{name}")
    found = read_lora(model.model, ours, "x")
    assert not found.unmatched and not found.misfits and len(found.patches) == len(truth) / 2
    assert_same(weights(apply_lora(model, found, EVEN)), weights(stock(model, truth)))


def test_root_names_are_the_audio_towers_in_a_file_with_layers_that_only_it_has(model):
    ours = make_lora(model, "^audio_model", lambda name: name.removeprefix("audio_model."))
    kernel = "patch_embedding.0"
    weight = model.model.state_dict()[f"diffusion_model.audio_model.{kernel}.weight"]
    ours |= {f"{kernel}.lora_A.weight": noise(RANK, *weight.shape[1:]) / 16,
             f"{kernel}.lora_B.weight": noise(weight.shape[0], RANK, 1) / 16}
    found = read_lora(model.model, ours, "x")
    assert {group_of(key) for key in found.patches} == {"audio", "picture_to_sound"} and not found.unmatched
    assert len(found.patches) == len(ours) / 2
    after = weights(apply_lora(model, found, EVEN))
    assert not torch.equal(after[f"diffusion_model.audio_model.{kernel}.weight"], weight)


def test_wan_lora_leaves_the_sound_alone(model):
    before = weights(model)
    after = weights(load(model, make_lora(model, r"^blocks\.\d+\.self_attn", diffusers)))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"diffusion_model.{name}.weight" for name in matrices(model, r"^blocks\.\d+\.self_attn")}


def test_what_is_not_of_the_model_is_counted(model):
    lora = make_lora(model, "blocks.0.self_attn.q", ovi)
    strangers = ["text_encoder.layers.0.q.lora_A.weight", "video_model.blocks.99.self_attn.q.lora_A.weight",
                 "vace_blocks.0.self_attn.q.lora_A.weight", "video_model.blocks.0.self_attn.q.weight"]
    found = read_lora(model.model, lora | {name: torch.zeros(1, 1) for name in strangers}, "x")
    assert found.unmatched == strangers and len(found.patches) == len(lora) / 2
