"""A LoRA that is trained: what it changes, what it leaves alone, and that every loader reads what was trained."""

from dataclasses import replace

import comfy.sd
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy.quant_ops import QuantizedTensor
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.ovi.lora_keys import GROUPS, apply_lora, read_lora
from ovi_native.ovi_model.training.loop import Settings, Trainer
from ovi_native.ovi_model.training.lora import LAYERS, Lora, LoraSettings
from ovi_native.ovi_model.training.network import Velocity, training_mode
from ovi_native.ovi_model.training.objective import Levels, Switches
from ovi_native.ovi_model.training.samples import SampleSettings, sample
from safetensors import safe_open
from safetensors.torch import load_file
from support.loras import EVEN, assert_same, weights
from support.training import MemoryClips
from tiny.compare import assert_pair_close, assert_pair_equal
from tiny.inputs import noise
from tiny.models import network, tiny_model, write_checkpoint
from tiny.sizes import Sizes

CLIPS = MemoryClips()
PLACE = {"seed": 1, "device": "cpu"}


def predict(net):
    with torch.no_grad():
        return NestedTensor(net([noise(1, 48, 2, 4, 4, seed=1), noise(1, 20, 10, seed=2)], torch.tensor([600.0]),
                                noise(1, 6, 64, seed=3), {}))


def train(model, settings: LoraSettings, steps=3, dtype=torch.float32, **options) -> Lora:
    """A LoRA after some steps; the network is as it was."""
    net = network(model).requires_grad_(False)
    with training_mode(), Lora(net, settings, **PLACE) as lora:
        trainer = Trainer(net, Settings(steps, 1e-2, warmup=1, video_share=0.5), Levels(), CLIPS.of_step(),
                          Velocity(net, dtype, **options), parameters=lora.parameters)
        for _ in range(steps):
            assert trainer.train_step().finite
    return lora


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_untrained_it_changes_nothing_bit_for_bit(model, tmp_path):
    truth, net = predict(network(model)), network(model)
    with Lora(net, LoraSettings(4, 4.0), **PLACE) as lora:
        assert_pair_equal(predict(net), truth)
        lora.save(tmp_path / "x.safetensors", {})
    assert len(lora.layers) == 2 * 3 * 12
    stock, _ = comfy.sd.load_lora_for_models(model, None, load_file(tmp_path / "x.safetensors"), 1.0, 0.0)
    assert_same(weights(stock), weights(model))


@pytest.mark.parametrize("alpha", [8.0, 2.0])
def test_both_loaders_give_what_the_training_network_gave(model, tmp_path, alpha):
    before = weights(model)
    lora = train(model, LoraSettings(4, alpha))
    path = tmp_path / "x.safetensors"
    lora.save(path, {"steps": "3"})
    plain, net = predict(network(model)), network(model)
    with lora:
        truth = predict(net)
    with pytest.raises(AssertionError):
        assert_pair_close(truth, plain, 1e-3)
    assert_pair_equal(predict(net), plain)
    assert not any(module._forward_hooks for module in net.modules())
    assert_same(weights(model), before)

    stock, _ = comfy.sd.load_lora_for_models(model, None, load_file(path), 1.0, 0.0)
    ours = apply_lora(model, read_lora(model.model, load_file(path), path.name), EVEN)
    for patched in (stock, ours):
        patched.patch_model(torch.device("cpu"))
        try:
            assert_pair_close(predict(network(patched)), truth, 1e-5)
        finally:
            patched.unpatch_model(torch.device("cpu"))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"steps": "3", "rank": "4", "alpha": f"{alpha:g}", "towers": "both", "format": "pt",
                                   "layers": "self-attention, text, fusion, feed-forward"}


@pytest.mark.parametrize("tower", ["audio", "video"])
def test_off_means_no_key(model, tmp_path, tower):
    """Training one tower writes nothing of the other, and leaves it bit-equal."""
    lora = train(model, LoraSettings(4, 4.0, towers=tower))
    lora.save(tmp_path / "x.safetensors", {})
    tensors = load_file(tmp_path / "x.safetensors")
    ours = [name.startswith("diffusion_model.audio_model.") == (tower == "audio") for name in tensors]
    assert len(tensors) == 3 * 12 * 3 and all(ours)
    stock, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    before, after = weights(model), weights(stock)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 3 * 12
    assert {key.startswith("diffusion_model.audio_model.") for key in changed} == {tower == "audio"}


def test_an_audio_lora_learns_from_the_picture_and_a_video_lora_from_the_sound(model):
    """Through the fusion, and through what the other tower makes of it afterwards."""
    net = network(model).requires_grad_(False)
    for tower, share in (("audio", 1.0), ("video", 0.0)):
        with training_mode(), Lora(net, LoraSettings(2, 2.0, towers=tower), **PLACE) as lora:
            trainer = Trainer(net, Settings(1, 1e-2, warmup=1, video_share=share), Levels(), CLIPS.of_step(),
                              Velocity(net, torch.float32), parameters=lora.parameters)
            assert trainer.train_step().finite
        changed = {name for name, module in lora.layers.items() if module.lora_up.weight.abs().max() > 0}
        # what comes after the last exchange has no part in the other stream
        assert set(lora.layers) - changed == {name for name in lora.layers
                                              if ".2.ffn." in name or ".2.cross_attn." in name}


class Plain(MemoryClips):
    """Clips of one value a channel, told apart by their captions alone."""

    def draw(self, batch, *options):
        found = super().draw(batch, *options)
        return replace(found, video=found.video.mean((2, 3, 4), keepdim=True).expand_as(found.video) * 8,
                       audio=found.audio.mean(2, keepdim=True).expand_as(found.audio) * 4)


def test_training_lowers_the_loss_and_brings_samples_to_the_clips():
    clips = Plain(clips=2, width=16)
    net = network(tiny_model(sizes=Sizes(heads=1, blocks=2, ffn=64, text=16, conv_hidden=32))).requires_grad_(False)
    velocity = Velocity(net, torch.float32)
    batch, empty = (clips.draw(2, torch.Generator().manual_seed(1), Switches(), drop) for drop in (0.0, 1.0))

    def distances() -> list[float]:
        found = sample(velocity, batch, empty, SampleSettings(steps=4, video_guidance=1.0, audio_guidance=1.0))
        return [float(((x - clean) ** 2).mean()) for x, clean in zip(found, (batch.video, batch.audio), strict=True)]

    with training_mode(), Lora(net, LoraSettings(16, 16.0), **PLACE) as lora:
        before = distances()
        trainer = Trainer(net, Settings(40, 1e-2, warmup=5, tail=10, video_share=0.5), Levels(), clips.of_step(),
                          velocity, parameters=lora.parameters)
        losses = [trainer.train_step().loss for _ in range(40)]
        after = distances()
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert all(b < 0.6 * a for a, b in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize("kind", LAYERS)
def test_kinds_of_layers_by_themselves(model, kind):
    found = read_lora(model.model, Lora(network(model), LoraSettings(2, 2.0, layers=(kind,)), **PLACE).tensors(), "x")
    groups = {group: len(found.layers(group)) for group in GROUPS}
    layers = 3 * len(LAYERS[kind])
    towers = ("sound_to_picture", "picture_to_sound") if kind == "fusion" else ("video", "audio")
    assert groups == {group: layers * (group in towers) for group in GROUPS}


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "fp8_scaled", "int8"])
@pytest.mark.usefixtures("either_loading")
def test_frozen_weights_of_any_precision(tmp_path, weight_dtype):
    """The static copy that training takes learns, and its weights stay; checkpointing changes no bit."""
    path = write_checkpoint(tmp_path, sizes=Sizes(heads=1, blocks=2, ffn=128, conv_hidden=32))
    patcher, _ = checkpoint.load_model(str(path), weight_dtype)
    with torch.inference_mode(False):
        copy = patcher.clone(disable_dynamic=True, force_deepcopy=True)
    assert not copy.is_dynamic()
    before = plain(copy)
    lora = train(copy, LoraSettings(4, 4.0), dtype=torch.bfloat16)
    assert all(module.lora_up.weight.abs().max() > 0 for module in lora.layers.values())
    assert all(p.dtype == torch.float32 for p in lora.parameters.values())
    assert_same(plain(copy), before)
    assert_same(train(copy, LoraSettings(4, 4.0), dtype=torch.bfloat16, blocks=2).tensors(), lora.tensors())


def plain(patcher) -> dict[str, torch.Tensor]:
    """All weights as they are multiplied with."""
    return {name: p.dequantize() if isinstance(p.data, QuantizedTensor) else p.detach().clone()
            for name, p in network(patcher).named_parameters()}


def test_the_change_of_a_layer_does_not_depend_on_which_others_change(model):
    every, one = (Lora(network(model), LoraSettings(4, 4.0, layers=layers), **PLACE).tensors()
                  for layers in (tuple(LAYERS), ("fusion",)))
    assert_same(one, {name: every[name] for name in one})


@pytest.mark.parametrize("settings, words", [
    ({"towers": "left"}, "towers of a LoRA must be one of both, video, audio, but got 'left'"),
    ({"layers": ("ffn",)}, "must be some of self-attention, text, fusion, feed-forward, but got 'ffn'"),
    ({"layers": ()}, "but got 'none'"), ({"rank": 0}, "at least 1"), ({"alpha": 0.0}, "above 0")])
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match=words):
        LoraSettings(**settings)
