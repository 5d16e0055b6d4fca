"""What is taught: exact text without its padding, what is given stays out of the loss, gradients where they belong."""

import math

import pytest
import torch
from ovi_native.ovi_model.training.attention import plain_attention
from ovi_native.ovi_model.training.objective import Batch, Levels, Switches, join_texts, losses, mix, stream_losses
from support.network_runs import FP32, run
from tiny.checkpoint import draw_weights
from tiny.compare import relative_l2
from tiny.inputs import noise, text
from tiny.models import load, network


@pytest.fixture(scope="module")
def model():
    return network(load(draw_weights()))


def batch(text_lengths=(9, 4), frames=3, **changes) -> Batch:
    count = len(text_lengths)
    joined, bias = join_texts([text(n, n)[0] for n in text_lengths])
    parts = {"video": noise(count, 48, frames, 4, 4, seed=1), "audio": noise(count, 20, 15, seed=2), "text": joined,
             "text_bias": bias, "video_generated": torch.ones(count, 1, frames, 1, 1),
             "audio_generated": torch.ones(count, 1, 1)}
    return Batch(**parts | changes)


def test_a_bias_stands_for_the_padding_of_a_text(model):
    """The same velocities as from texts of 512 tokens, for texts of unequal length in one batch."""
    video, audio = noise(2, 48, 3, 4, 4, seed=1), noise(2, 20, 15, seed=2)
    texts = [text(9, 3)[0], text(4, 5)[0]]
    joined, bias = join_texts(texts, 12)
    padded = torch.stack([torch.nn.functional.pad(each, (0, 0, 0, 512 - len(each))) for each in texts])
    for streams in ((video, audio), (video, None), (None, audio)):
        found = run(model, *streams, [700.0, 300.0], joined, text_bias=bias)
        truth = run(model, *streams, [700.0, 300.0], padded)
        for a, b in zip(found, truth, strict=True):
            assert (a is None and b is None) or relative_l2(a, b) < FP32
    without = run(model, video, audio, [700.0, 300.0], joined, text_bias=torch.zeros_like(bias))
    assert relative_l2(without[0], truth[0] if truth[0] is not None else video) > 1e-3  # the bias matters


def test_plain_attention_is_cores(model):
    video, audio = noise(2, 48, 3, 4, 4, seed=1), noise(2, 20, 15, seed=2)
    joined, bias = join_texts([text(9, 3)[0], text(4, 5)[0]])
    options = {"optimized_attention_override": plain_attention}
    found = run(model, video, audio, [700.0, 300.0], joined, transformer_options=options, text_bias=bias)
    truth = run(model, video, audio, [700.0, 300.0], joined, text_bias=bias)
    assert all(relative_l2(a, b) < FP32 for a, b in zip(found, truth, strict=True))


def test_a_text_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="9 tokens, and only 8 fit"):
        join_texts([text(9, 1)[0]], 9)


def test_a_full_text_has_no_padding():
    _, bias = join_texts([text(512, 1)[0], text(500, 1)[0]])
    assert bias[0, 512] == -1e4 and bias[1, 500] == pytest.approx(math.log(12))


def test_the_loss_is_of_the_velocity():
    """A network that knows the answer has no loss; one that says nothing has that of the velocity itself."""
    b, sigma = batch(), torch.tensor([0.3, 0.8])
    video_noise, audio_noise = torch.randn_like(b.video), torch.randn_like(b.audio)

    def knowing(noisy, timestep, *_, **__):
        assert torch.equal(timestep, sigma * 1000)
        level = (timestep / 1000).view(-1, 1, 1)
        assert torch.allclose(noisy[1], (1 - level) * b.audio + level * audio_noise)
        return [video_noise - b.video, audio_noise - b.audio]

    assert all(float(each.abs().max()) == 0 for each in losses(knowing, b, sigma, video_noise, audio_noise))
    silent = losses(lambda noisy, *_, **__: [torch.zeros_like(x) for x in noisy], b, sigma, video_noise, audio_noise)
    assert torch.allclose(silent[1], ((audio_noise - b.audio) ** 2).mean((1, 2)))


@pytest.mark.parametrize("given", ["first", "video", "audio"])
def test_what_is_given_stays_clean_and_is_not_counted(given):
    video, audio = torch.ones(2, 1, 3, 1, 1), torch.ones(2, 1, 1)
    {"first": video[:, :, :1], "video": video, "audio": audio}[given].zero_()
    b, sigma, seen = batch(video_generated=video, audio_generated=audio), torch.tensor([0.9, 0.9]), {}
    noises = torch.randn_like(b.video), torch.randn_like(b.audio)

    def network_(noisy, *_, denoise_mask, audio_denoise_mask, **__):
        seen.update(video=noisy[0], audio=noisy[1], masks=(denoise_mask, audio_denoise_mask))
        return [torch.full_like(x, 3.0) for x in noisy]

    found = losses(network_, b, sigma, *noises)
    assert seen["masks"] == (video, audio)
    if given == "first":
        assert torch.equal(seen["video"][:, :, 0], b.video[:, :, 0])
        rest = ((3.0 - (noises[0] - b.video)) ** 2)[:, :, 1:].flatten(1).mean(1)
        assert torch.allclose(found[0], rest)
    else:
        index = ("video", "audio").index(given)
        assert torch.equal(seen[given], getattr(b, given))
        assert torch.equal(found[index], torch.zeros(2)) and float(found[1 - index].min()) > 0


def test_a_part_of_a_stream_can_be_given():
    """Time ranges of the sound: inpainting and extension."""
    mask = torch.ones(2, 1, 15)
    mask[:, :, :5] = 0
    clean, noises = noise(2, 20, 15, seed=2), noise(2, 20, 15, seed=4)
    noisy = mix(clean, noises, torch.tensor([0.5, 1.0]), mask)
    assert torch.equal(noisy[:, :, :5], clean[:, :, :5]) and torch.equal(noisy[1, :, 5:], noises[1, :, 5:])
    wrong_where_given = noises - clean
    wrong_where_given[:, :, :5] += 100
    assert float(stream_losses(wrong_where_given, clean, noises, mask).max()) == 0


def test_switches_draw_their_shares():
    video, audio = Switches(0.3, 0.2, 0.25).draw(4000, 5, torch.Generator().manual_seed(0))
    whole = (video.flatten(1) == 0).all(1)
    assert whole.float().mean() == pytest.approx(0.3, abs=0.03)
    assert (audio == 0).float().mean() == pytest.approx(0.2, abs=0.03)
    assert not (whole & (audio.flatten() == 0)).any(), "a clip of which nothing is generated teaches nothing"
    first = (video[:, 0, 0, 0, 0] == 0) & ~whole
    assert first.float().mean() == pytest.approx(0.25 * 0.7, abs=0.03) and float(video[first][:, :, 1:].min()) == 1


def test_levels_are_shifted_towards_noise():
    random = torch.Generator().manual_seed(0)
    normal, shifted = (Levels("logit-normal", shift).draw(8000, random) for shift in (1.0, 5.0))
    assert normal.median() == pytest.approx(0.5, abs=0.02) and shifted.median() == pytest.approx(5 / 6, abs=0.02)
    uniform = Levels("uniform", 1.0).draw(8000, random)
    assert uniform.quantile(0.1) == pytest.approx(0.1, abs=0.02) and float(uniform.max()) <= 1
    with pytest.raises(ValueError, match="one of logit-normal, uniform, but got 'cosine'"):
        Levels("cosine")


@pytest.mark.parametrize("make, words", [
    (lambda: Levels(shift=0.0), "shift .* above 0, but got 0"), (lambda: Levels(shift=math.nan), "but got nan"),
    (lambda: Switches(first_frame=1.5), "first_frame is a share .* but got 1.5"),
    (lambda: Switches(0.6, 0.5), r"must not exceed 1 together, but got 0.6 and 0.5\. Lower")])
def test_settings_that_make_no_sense(make, words):
    with pytest.raises(ValueError, match=words):
        make()
