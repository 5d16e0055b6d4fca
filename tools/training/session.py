"""From a file of settings to a training: what is announced, what is loaded, what is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from ovi_native.ovi_model.files.disk import human
from ovi_native.ovi_model.media import audio_vae
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.ovi.quant_recipe import FORMATS
from ovi_native.ovi_model.ovi.variants import GEOMETRY, VARIANT_KEY, get_variant
from ovi_native.ovi_model.text import umt5
from ovi_native.ovi_model.training.data import make_dataset
from ovi_native.ovi_model.training.encoding import DataSettings, Encoders
from ovi_native.ovi_model.training.full_run import FullJob, train_full
from ovi_native.ovi_model.training.log import Log
from ovi_native.ovi_model.training.loop import Settings
from ovi_native.ovi_model.training.lora import LoraSettings
from ovi_native.ovi_model.training.lora_run import LoraJob, Place, train_lora
from ovi_native.ovi_model.training.memory import Need, Shape
from ovi_native.ovi_model.training.objective import Levels, Switches
from ovi_native.ovi_model.training.recipes import RECIPES
from ovi_native.ovi_model.training.run import Progress, checkpoints

from .settings import File, read_settings

WEIGHT_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32, **{name: name for name in FORMATS}}
Say = Callable[[str], None]


def read(path: Path) -> File:
    """Read a file of settings and check what can be checked without loading anything."""
    file = read_settings(path)
    if file.model.weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"[model] weight_dtype must be one of {', '.join(WEIGHT_DTYPES)}, but got "
                         f"{file.model.weight_dtype!r}.")
    if file.full and file.full.recipe not in RECIPES:
        raise ValueError(f"[full] recipe must be one of {', '.join(RECIPES)}, but got {file.full.recipe!r}.")
    data = file.data
    wanted = {"[model] file": file.model.file, "[model] second_file": file.model.second_file, "[data] vae": data.vae,
              "[data] audio_vae": data.audio_vae, "[data] vocoder": data.vocoder, "[data] tokenizer": data.tokenizer,
              "[data] text_encoder": data.text_encoder, "[data] folder": data.folder}
    for setting, name in wanted.items():
        if name and not file.path(name).exists():
            raise RuntimeError(f"{setting}: {file.path(name)} is not there.")
    if file.lora:
        lora_settings(file)
    get_variant(data.variant)
    common(file)
    for setting in ("batch", "keep", "log_every"):
        if getattr(file.training, setting) < 1:
            raise ValueError(f"[training] {setting} must be at least 1, but got {getattr(file.training, setting)}.")
    where = place(file)
    if where.lora.exists() and not where.begun:
        raise RuntimeError(f"{where.lora} is there already, and its checkpoints are not: choose another name.")
    return file


def loop_settings(file: File) -> Settings:
    t = file.training
    return Settings(t.steps, t.learning_rate, t.audio_learning_rate or None, t.warmup, t.tail, t.weight_decay,
                    average=t.average, video_share=t.video_share, seed=t.seed, accumulate=t.accumulate)


def common(file: File) -> dict[str, Any]:
    """What both kinds of training are told alike."""
    t = file.training
    return {"levels": Levels(t.distribution, t.shift), "batch": t.batch, "save_every": t.save_every, "keep": t.keep,
            "switches": Switches(t.video_given, t.audio_given, t.first_frame),
            "samples": file.samples, "settings": loop_settings(file)}


def lora_settings(file: File) -> LoraSettings:
    assert file.lora is not None
    return LoraSettings(file.lora.rank, file.lora.alpha, file.lora.towers, file.lora.layers)


def place(file: File) -> Place:
    output = file.path(file.output)
    return Place(output / f"{file.name}.safetensors", output / file.name)


# --- what it will do --------------------------------------------------------------------------------------------------


def announce(file: File) -> Iterator[str]:
    """What a file of settings asks for, where it goes, and the memory it will need."""
    where, t = place(file), file.training
    what = f"a LoRA of rank {file.lora.rank}" if file.lora else f"{RECIPES[file.full.recipe].title}"  # type: ignore
    found = checkpoints(where.folder)
    yield f"Trains {what} on {file.path(file.data.folder)}, {t.steps} steps of {t.batch * t.accumulate} clips."
    yield f"Result: {where.lora}; checkpoints and log: {where.folder}"
    yield f"Goes on from {found[0].name}." if found else "Begins anew."
    need = memory_of(file)
    yield f"Memory at the largest clips it makes ({need.what}): {need}"
    device = comfy.model_management.get_torch_device()
    total = comfy.model_management.get_total_memory(device)
    if need.total > total:
        yield (f"That is more than {device} has ({human(total)}). Lower batch, size or longest_seconds, take fp8 or "
               "int8 weights, or keep no activations (blocks_without_checkpointing = 0).")


def memory_of(file: File) -> Need:
    """The largest clip is a square of the whole area, at the full length."""
    tensors, _ = checkpoint.read_checkpoint(str(file.path(file.model.file)), second(file))
    data = DataSettings(file.data.variant, file.data.size, file.data.longest_seconds)
    frames = GEOMETRY.latent_frames_from_frames(data.longest)
    tokens = frames * data.area // GEOMETRY.size_multiple**2
    shape = Shape.of(tensors, file.model.weight_dtype)
    t = file.training
    if file.lora:
        trained = shape.lora(lora_settings(file))
    else:
        assert file.full is not None
        wants = RECIPES[file.full.recipe].wants
        trained = sum(tensor.numel() for name, tensor in tensors.items() if wants(name))
    return shape.need(tokens * t.batch, trained, t.blocks_without_checkpointing, full=file.lora is None,
                      average=t.average > 0)


def second(file: File) -> str | None:
    return str(file.path(file.model.second_file)) if file.model.second_file else None


# --- what it does -----------------------------------------------------------------------------------------------------


def run(file: File, say: Say) -> list[str]:
    """Encode what is not in the cache, load the model, train; returns what is worth saying at the end."""
    dataset = read_data(file, say)
    for line in (*dataset.lines, *dataset.warnings):
        say(line)
    comfy.model_management.unload_all_models()
    patcher, found = checkpoint.load_model(str(file.path(file.model.file)), WEIGHT_DTYPES[file.model.weight_dtype],
                                           second(file), file.model.variant or None)
    say(str(found))
    t, where = file.training, place(file)
    options = {**common(file), "metadata": {VARIANT_KEY: found.variant} if found.variant else {},
               "blocks": max(0, found.blocks - t.blocks_without_checkpointing)}

    def log(folder: Path) -> Log:
        return Log(folder / "log.jsonl", t.log_every, folder / "events" if t.tensorboard else None)

    show = Printer(say, t.log_every)
    if file.lora:
        job = LoraJob(lora=lora_settings(file), **options)
        return train_lora(patcher, dataset, job, where, show, log=log).lines
    assert file.full is not None
    full = FullJob(recipe=file.full.recipe, fresh=file.full.fresh_fusion, **options)
    return train_full(patcher, dataset, full, where.lora, where.folder, show, log)


class Printer:
    """Prints a line every so many steps."""

    def __init__(self, say: Say, every: int) -> None:
        self.say, self.every = say, max(1, every)

    def __call__(self, progress: Progress) -> None:
        if (progress.result.step + 1) % self.every == 0:
            self.say(str(progress))


def read_data(file: File, say: Say):
    """The dataset of a file of settings."""
    data = file.data
    encoders = Encoders(
        comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file.path(data.vae)))),
        audio_vae.load_audio_vae(str(file.path(data.audio_vae)),
                                 str(file.path(data.vocoder)) if data.vocoder else None),
        umt5.load_text_encoder(str(file.path(data.text_encoder)),
                               str(file.path(data.tokenizer)) if data.tokenizer else None))
    settings = DataSettings(data.variant, data.size, data.longest_seconds, data.caption_prefix)
    return make_dataset(file.path(data.folder), encoders, settings, file.path(data.cache) if data.cache else None,
                        lambda *facts: say(" ".join(map(str, facts))), data.caption_dropout)
