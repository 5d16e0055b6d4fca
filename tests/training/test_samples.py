"""Clips sampled on the way."""

import comfy.model_management
import pytest
import torch
from ovi_native.ovi_model.ovi import latents
from ovi_native.ovi_model.training.network import Velocity, training_mode
from ovi_native.ovi_model.training.samples import Sampler, SampleSettings, sample
from support.training import MemoryClips
from tiny.models import network, tiny_model
from tiny.sizes import Sizes

CLIPS = MemoryClips(width=16)
SETTINGS = SampleSettings(every=1, clips=2, steps=3)


def test_euler_reaches_the_clips_along_their_own_velocity():
    """With the true velocity of a clip, and guidance between two that are the same."""
    batch = CLIPS.draw(2, torch.Generator().manual_seed(0))

    def velocity(x, time, _text, text_bias):
        assert text_bias.shape[0] == 2
        sigma = time[0] / 1000
        return [(noisy - clean) / sigma for noisy, clean in zip(x, (batch.video, batch.audio), strict=True)]

    for found, truth in zip(sample(velocity, batch, batch, SETTINGS), (batch.video, batch.audio), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


def test_sampling_can_be_cancelled():
    batch = CLIPS.draw(2, torch.Generator().manual_seed(0))
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(lambda *_, **__: pytest.fail("went on"), batch, batch, SETTINGS)


def test_samples_are_the_same_for_the_same_weights_and_leave_no_gradient(tmp_path):
    net = network(tiny_model(sizes=Sizes(heads=1, blocks=2, ffn=64, text=16, conv_hidden=32))).requires_grad_(True)
    with training_mode():
        sampler = Sampler(Velocity(net, torch.float32, 2), CLIPS, SETTINGS, tmp_path, "cpu")
        sampler(1)
        sampler(2)
        assert torch.is_grad_enabled() and all(p.grad is None for p in net.parameters())
        with torch.no_grad():
            net.head.head.weight += 0.1
        sampler(3)
        with torch.no_grad():
            net.head.head.weight += float("nan")
        sampler(4)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    assert names == [f"sample_0000000{n}{latents.ENDING}" for n in (1, 2, 3)]
    one, same, other = (latents.load(tmp_path / name)[0]["samples"].unbind() for name in names)
    assert one[0].shape == (2, 48, 2, 4, 4) and one[1].shape == (2, 20, 10)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True)) and not torch.equal(one[0], other[0])
