"""The loop: resume after a kill, gradients in parts, streams alone, checkpointed blocks, what ends a run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import pytest
import torch
from ovi_native.ovi_model.training import log as training_log
from ovi_native.ovi_model.training.log import Log
from ovi_native.ovi_model.training.loop import MOST_SKIPPED, Settings, Trainer
from ovi_native.ovi_model.training.network import Velocity, training_mode
from ovi_native.ovi_model.training.objective import Levels, Switches, losses, weighted
from ovi_native.ovi_model.training.run import Run, checkpoints
from safetensors.torch import load_file
from support.training import MemoryClips
from tiny.inputs import noise
from tiny.models import network, tiny_model
from tiny.sizes import Sizes

SMALL = Sizes(heads=1, blocks=2, ffn=64, text=16, conv_hidden=32)
CLIPS = MemoryClips(width=16)
SETTINGS = Settings(steps=6, learning_rate=1e-3, warmup=2, average=0.9, video_share=0.5, seed=3)


@pytest.fixture(autouse=True)
def with_gradients():
    with training_mode():
        yield


def trainer(settings=SETTINGS, draw=None, blocks=0, net=None, **options) -> Trainer:
    net = net or network(tiny_model(sizes=SMALL)).requires_grad_(True)
    return Trainer(net, settings, Levels(), draw or CLIPS.of_step(), Velocity(net, torch.float32, blocks), **options)


def gradients(net, batch, blocks=0) -> dict[str, torch.Tensor | None]:
    net.zero_grad(set_to_none=True)
    sigma = torch.tensor([0.3, 0.7])
    noises = [None if x is None else noise(*x.shape, seed=9) for x in (batch.video, batch.audio)]
    loss = weighted(*losses(Velocity(net, torch.float32, blocks), batch, sigma, *noises), batch, 0.5)
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


# --- resume -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, random, signal, sys, time
from pathlib import Path
root, folder, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
sys.path[:0] = [str(root / "tools"), str(root / "tests")]
from devlib.pack import import_pack
import_pack()
import torch
torch.set_num_threads(1)
from ovi_native.ovi_model.training.loop import Settings, Trainer
from ovi_native.ovi_model.training.network import Velocity, training_mode
from ovi_native.ovi_model.training.objective import Levels
from ovi_native.ovi_model.training.run import Run, checkpoints
from support.training import MemoryClips
from tiny.models import network, tiny_model
from tiny.sizes import Sizes

def train(folder):
    with training_mode():
        net = network(tiny_model(sizes=Sizes(heads=1, blocks=2, ffn=64, text=16, conv_hidden=32))).requires_grad_(True)
        settings = Settings(steps=steps, learning_rate=1e-3, warmup=2, average=0.9, video_share=0.5, seed=3)
        run = Run(Trainer(net, settings, Levels(), MemoryClips(width=16).of_step(), Velocity(net, torch.float32)),
                  folder, save_every=1)
        run.resume()
        run.go()

def reached(folder):
    return max([int(path.stem[-8:]) for path in checkpoints(folder)], default=0)

def in_a_process(folder, kill):  # forked, so that the imports are paid for once
    folder.mkdir(exist_ok=True)
    target = reached(folder) + random.randint(1, 6)
    child = os.fork()
    if child == 0:
        try:
            train(folder)
            os._exit(0)
        finally:
            os._exit(1)
    while kill and reached(folder) < target:
        time.sleep(0.001)
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return "failed"
    if kill:
        time.sleep(random.random() * 0.02)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

random.seed(5)
print([in_a_process(folder / "killed", kill) for kill in (True, True, True, False)],
      in_a_process(folder / "whole", False))
"""


def test_a_run_killed_again_and_again_ends_where_an_undisturbed_one_does(tmp_path):
    steps, root = 30, Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(root), str(tmp_path), str(steps)], text=True, check=True,
                          stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.splitlines()[-1] == "[-9, -9, -9, 0] 0"
    killed, whole = (checkpoints(tmp_path / name)[0] for name in ("killed", "whole"))
    assert killed.name == whole.name == f"checkpoint_{steps:08}.safetensors"
    truth = load_file(whole)
    assert any(name.startswith("average.") for name in truth)
    for name, value in load_file(killed).items():
        assert torch.equal(value, truth[name]), name


def test_checkpoints_are_kept_by_number_and_a_damaged_one_is_passed_over(tmp_path):
    run = Run(trainer(), tmp_path, save_every=1, keep=3)
    run.go()
    found = checkpoints(tmp_path)
    assert [path.name for path in found] == [f"checkpoint_{n:08}.safetensors" for n in (6, 5, 4)]
    assert not list(tmp_path.glob("*.part"))
    found[0].write_bytes(found[0].read_bytes()[:1000])
    again = Run(trainer(), tmp_path)
    said = again.resume()
    assert again.trainer.step == 5 and "damaged" in said[0] and said[1] == "goes on after step 5"


def test_damaged_checkpoints_do_not_take_the_place_of_later_ones(tmp_path):
    for step in (8, 9):
        (tmp_path / f"checkpoint_{step:08}.safetensors").write_bytes(b"damaged")
    run = Run(trainer(), tmp_path, save_every=1, keep=2)
    assert len(run.resume()) == 2 and run.trainer.step == 0
    run.go()
    assert [int(path.stem[-8:]) for path in checkpoints(tmp_path)] == [9, 8, 6, 5]


def test_a_run_that_was_finished_says_that_nothing_was_trained(tmp_path):
    Run(trainer(), tmp_path).go()
    again = Run(trainer(), tmp_path)
    assert "nothing was trained now: raise steps" in again.resume()[0]


def test_a_run_that_is_interrupted_amid_an_update_keeps_the_checkpoint_before(tmp_path):
    """Ctrl+C may come between the optimiser's step and its number."""
    run = Run(trainer(), tmp_path, save_every=2)
    whole, calls = run.trainer.optimiser.step, []

    def step():
        whole()
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    run.trainer.optimiser.step = step
    with pytest.raises(KeyboardInterrupt):
        run.go()
    assert [int(path.stem[-8:]) for path in checkpoints(tmp_path)] == [2]


def test_averaged_weights_are_what_is_written_and_sampled(tmp_path):
    run, seen = Run(trainer(), tmp_path, save_every=0, sample_every=6), []

    def look(_step):
        seen.append({name: p.detach().clone() for name, p in run.trainer.parameters.items()})

    run.on_save = run.on_sample = look
    run.go()
    assert len(seen) == 2
    for found in seen:
        for name, value in found.items():
            assert torch.equal(value, run.trainer.averages[name])
    kept = load_file(checkpoints(tmp_path)[0])
    name = "blocks.0.ffn.0.weight"
    assert torch.equal(kept[f"weight.{name}"], run.trainer.parameters[name])
    assert not torch.equal(kept[f"weight.{name}"], kept[f"average.{name}"])


def test_a_checkpoint_of_another_training_is_refused_in_words(tmp_path):
    Run(trainer(replace(SETTINGS, steps=1)), tmp_path).go()
    net = network(tiny_model(sizes=replace(SMALL, ffn=32))).requires_grad_(True)
    with pytest.raises(ValueError, match=r"no checkpoint of this training: .*ffn.* has another shape"):
        Run(trainer(net=net), tmp_path).resume()


# --- gradients --------------------------------------------------------------------------------------------------------


def test_two_batches_accumulated_are_one_of_both():
    """By the gradient itself: AdamW's first step knows only its sign."""
    net = network(tiny_model(sizes=SMALL)).requires_grad_(True)
    seen = []
    one = trainer(replace(SETTINGS, accumulate=2, largest_norm=1e9), net=net)
    one.optimiser.step = lambda: seen.append({name: p.grad.clone() for name, p in one.parameters.items()})
    one.train_step()
    random = one.random(0)
    total: dict[str, torch.Tensor] = {}
    for _ in range(2):
        batch = CLIPS.draw(2, random)
        sigma = one.levels.draw(2, random)
        noises = [torch.randn(x.shape, generator=random) for x in (batch.video, batch.audio)]
        net.zero_grad(set_to_none=True)
        weighted(*losses(one.velocity, batch, sigma, *noises), batch, 0.5).backward()
        for name, p in net.named_parameters():
            total[name] = total.get(name, 0) + p.grad / 2
    for name, gradient in seen[0].items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("blocks", [1, 2])
def test_checkpointed_blocks_have_the_same_gradients(blocks):
    net = network(tiny_model(sizes=SMALL)).requires_grad_(True)
    batch = CLIPS.draw(2, torch.Generator().manual_seed(1), Switches(first_frame=1.0))
    truth, found = gradients(net, batch), gradients(net, batch, blocks)
    runs = []
    handle = net.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    gradients(net, batch, blocks)
    handle.remove()
    assert len(runs) == 2  # forward, and again in the backward pass
    for name in truth:
        assert torch.equal(found[name], truth[name]), name


@pytest.mark.parametrize("stream", ["video", "audio"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_a_stream_that_is_alone_gives_no_gradient_to_the_other_tower(stream, blocks):
    net = network(tiny_model(sizes=SMALL)).requires_grad_(True)
    batch = CLIPS.draw(2, torch.Generator().manual_seed(1)).only(stream)
    for name, gradient in gradients(net, batch, blocks).items():
        belongs = name.startswith("audio_model.") == (stream == "audio") and "fusion" not in name
        assert (gradient is not None) == belongs, name


def test_a_stream_alone_counts_in_full():
    batch = CLIPS.draw(2, torch.Generator().manual_seed(1))
    video, audio = torch.tensor([1.0, 3.0]), torch.tensor([4.0, 6.0])
    assert weighted(video, audio, batch.only("video"), 0.1) == 2 and weighted(video, audio, batch.only("audio"), 1) == 5


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_step_without_a_finite_loss_changes_nothing_and_twenty_end_the_run(tmp_path):
    broken = [True]

    def draw(step, random):
        batch = CLIPS.of_step()(step, random)
        return replace(batch, audio=batch.audio * float("nan")) if broken[0] else batch

    one = trainer(replace(SETTINGS, steps=50), draw)
    before = {name: p.detach().clone() for name, p in one.parameters.items()}
    assert not one.train_step().finite and one.skipped == one.skipped_in_a_row == 1
    assert all(torch.equal(p, before[name]) for name, p in one.parameters.items())
    broken[0] = False
    assert one.train_step().finite and one.skipped_in_a_row == 0
    broken[0] = True
    run = Run(one, tmp_path, save_every=0)
    with pytest.raises(RuntimeError, match=f"not finite in {MOST_SKIPPED} steps in a row"):
        run.go()
    assert one.step == 2 + MOST_SKIPPED and len(checkpoints(tmp_path)) == 1
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["skipped"] == 10


def test_out_of_memory_is_a_sentence_and_leaves_nothing_behind(tmp_path):
    import gc
    import weakref

    held: list[weakref.ref] = []

    def draw(step, random):
        batch = CLIPS.of_step()(step, random)
        if step == 2:
            held.append(weakref.ref(batch.video))
            big = batch.video.repeat(2, 1, 1, 1, 1)
            held.append(weakref.ref(big))
            raise comfy.model_management.OOM_EXCEPTION("no more")
        return batch

    run = Run(trainer(draw=draw), tmp_path, save_every=0)
    with pytest.raises(RuntimeError, match=r"memory in step 3\. Lower .*batch.*checkpointing.*rank.*step 2 is kept"
                       ) as caught:
        run.go()
    assert caught.value.__context__ is None
    gc.collect()
    assert not any(reference() is not None for reference in held)
    assert all(p.grad is None for p in run.trainer.parameters.values())
    assert checkpoints(tmp_path)[0].name == "checkpoint_00000002.safetensors"


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as POSIX does")
def test_a_full_disk_is_a_sentence_and_keeps_the_checkpoint_before(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress):
        if progress.result.step == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))

    run = Run(trainer(), tmp_path, save_every=2)
    run.on_step = fill
    try:
        with pytest.raises(RuntimeError, match=r"up to step 4 could not be written .* Make room"):
            run.go()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000002.safetensors"]


def test_a_log_that_cannot_be_written_costs_no_step(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    run = Run(trainer(), tmp_path, save_every=0, log=Log(tmp_path / "log.jsonl", every=3))
    with pytest.raises(RuntimeError, match=r"log .* could not be written .* Make room"):
        run.go()
    assert checkpoints(tmp_path)[0].name == "checkpoint_00000003.safetensors"


def test_a_run_that_fails_before_its_first_step_writes_nothing(tmp_path):
    def draw(*_):
        raise comfy.model_management.OOM_EXCEPTION("no more")

    with pytest.raises(RuntimeError, match="memory in step 1"):
        Run(trainer(draw=draw), tmp_path).go()
    assert not list(tmp_path.iterdir())


def test_a_cancelled_run_keeps_its_last_step(tmp_path):
    run = Run(trainer(), tmp_path, save_every=0)
    saved, samples = [], []
    run.on_save, run.on_sample, run.sample_every = saved.append, samples.append, 2

    def cancel(progress):
        assert "step" in str(progress) and progress.seconds_left > 0
        if progress.result.step == 3:
            raise comfy.model_management.InterruptProcessingException

    run.on_step = cancel
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run.go()
    assert saved == [4] and samples == [2, 4]


def test_training_mode_ends_with_an_error():
    comfy.model_management.in_training = False
    with pytest.raises(KeyError), torch.inference_mode(), training_mode():
        assert comfy.model_management.in_training and not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        raise KeyError
    assert not comfy.model_management.in_training


# --- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_tells_streams_and_noise_levels_apart(tmp_path):
    one = trainer()
    log = Log(tmp_path / "log.jsonl", every=3)
    results = [one.train_step() for _ in range(4)]
    for result in results:
        log.add(result)
    log.write()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    sigma = torch.cat([result.sigma for result in results[:3]])
    audio = torch.cat([result.audio_losses for result in results[:3]])
    levels = lines[0]["audio_levels"]
    for i, level in enumerate(levels):
        inside = audio[(sigma >= i / 4) & (sigma < (i + 1) / 4)]
        assert level is None if not len(inside) else level == pytest.approx(float(inside.mean()), abs=1e-4)


def test_tensorboard_that_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(training_log.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="tensorboard is not installed: pip install"):
        Log(tmp_path / "log.jsonl", tensorboard=tmp_path / "events")
