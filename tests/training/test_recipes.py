"""Which weights the stages of full training touch."""

import pytest
import torch
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.training.loop import Settings, Trainer
from ovi_native.ovi_model.training.lora import LoraSettings, count, shapes
from ovi_native.ovi_model.training.network import Velocity, training_mode
from ovi_native.ovi_model.training.objective import Levels
from ovi_native.ovi_model.training.recipes import RECIPES, fresh_fusion, prepare
from support.training import MemoryClips
from tiny.compare import assert_pair_close
from tiny.fake_gpu import make_network
from tiny.inputs import noise
from tiny.models import network, tiny_model, write_checkpoint
from tiny.sizes import Sizes

FULL = Sizes(heads=24, blocks=30, ffn=14336, text=4096)
TRAINED = {"audio": 5_527_581_716, "video": 4_999_787_712, "fusion": 5_666_918_400, "fusion layers": 1_133_383_680,
           "everything": 11_660_753_108}
"""At full size. The paper says 5.7 of 11.7 billion for the fusion stage."""


@pytest.fixture(scope="module")
def full():
    return make_network(FULL, torch.nn, device="meta")


@pytest.mark.parametrize("name", RECIPES)
def test_how_many_weights_are_trained_at_full_size(full, name):
    assert prepare(full, name) == TRAINED[name]
    assert sum(p.numel() for p in full.parameters() if p.requires_grad) == TRAINED[name]
    assert sum(p.numel() for p in full.parameters()) == TRAINED["everything"]


def test_a_lora_at_full_size(full):
    found = shapes(full, LoraSettings())
    assert len(found) == 2 * 30 * 12 and count(found.values(), 32) == 184_811_520


@pytest.mark.parametrize("name", RECIPES)
def test_exactly_these_weights_get_a_gradient_and_change(name):
    net = network(tiny_model())
    prepare(net, name)
    streams, clips = RECIPES[name].streams, MemoryClips()

    def draw(step, random):
        batch = clips.of_step()(step, random)
        return batch if streams == "both" else batch.only(streams)

    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    with training_mode():
        trainer = Trainer(net, Settings(1, 1e-2, warmup=1), Levels(), draw, Velocity(net, torch.float32))
        assert trainer.train_step().finite
    for key, p in net.named_parameters():
        assert torch.equal(p, before[key]) != RECIPES[name].wants(key), key


def test_fresh_fusion_attention_leaves_each_tower_as_it_is_alone():
    net = network(tiny_model())
    latents = [noise(1, 48, 2, 4, 4, seed=1), noise(1, 20, 10, seed=2)]

    def predict(video, audio):
        with torch.no_grad():
            return net([video, audio], torch.tensor([600.0]), noise(1, 6, 64, seed=3), {})

    alone = predict(latents[0], None)[0], predict(None, latents[1])[1]
    with pytest.raises(AssertionError):
        assert_pair_close(predict(*latents), alone, 1e-3)
    assert fresh_fusion(net, 1) == 2 * 3 * 7
    assert_pair_close(predict(*latents), alone, 1e-6)
    keys = net.blocks[0].cross_attn.k_fusion.weight
    assert keys.std() * keys.shape[1] ** 0.5 == pytest.approx(1, abs=0.05)


def test_bad_input(tmp_path):
    net = network(tiny_model())
    with pytest.raises(ValueError, match="Unknown recipe 'all': expected one of audio, video, fusion"):
        prepare(net, "all")
    patcher, _ = checkpoint.load_model(str(write_checkpoint(tmp_path)), "fp8_scaled")
    with pytest.raises(ValueError, match="quantised, and quantised weights cannot be trained"):
        prepare(network(patcher), "fusion")
