"""Training a LoRA inside ComfyUI: 'Ovi Train LoRA'."""

import time
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..ovi_model.files.names import printable
from ..ovi_model.files.reader import load_weights
from ..ovi_model.ovi.lora_keys import GROUPS, apply_lora, read_lora
from ..ovi_model.ovi.variants import VARIANT_KEY
from ..ovi_model.training.loop import Settings
from ..ovi_model.training.lora import LAYERS, TOWERS, LoraSettings
from ..ovi_model.training.lora_run import LoraJob, Place, find_place, train_lora
from ..ovi_model.training.objective import DISTRIBUTIONS, Levels, Switches
from ..ovi_model.training.run import Progress, duration
from ..ovi_model.training.samples import SampleSettings
from .inputs import check_inputs, shown
from .report import later, report
from .sampling import require_ovi
from .training import DATASET

LAYER_CHOICES = {
    "all": tuple(LAYERS),
    "attention": ("self-attention", "text", "fusion"),
    "self-attention and text": ("self-attention", "text"),
    "self-attention": ("self-attention",),
    "text": ("text",),
    "fusion": ("fusion",),
    "feed-forward": ("feed-forward",),
}
SHOWN_EVERY = 0.5  # seconds between lines on the node


def share_input(name: str, default: float, tooltip: str):
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.05, advanced=True, tooltip=tooltip)


class OviTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviTrainLora",
            display_name="Ovi Train LoRA",
            search_aliases=["fine-tune", "finetune", "training", "dreambooth"],
            category="Ovi/training",
            description="Trains a LoRA on your clips, and puts it on the model. Cancel whenever you like: what was "
                        "learnt is kept, and the next run goes on from there.",
            inputs=[
                io.Model.Input("model", tooltip=(
                    "An Ovi model from 'Load Ovi Model', with LoRA on it or not; fp8 and int8 weights do as well. It "
                    "stays as it is: a copy is trained.")),
                DATASET.Input("dataset", tooltip="Clips with captions, from 'Ovi Dataset'."),
                io.String.Input("name", default="my_lora", tooltip=(
                    "File name of the LoRA, which is written to output/loras. Nothing is overwritten: another run "
                    "under this name gets a number.")),
                io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip=(
                    "How often the LoRA is changed, 1 to 1000000. Some hundred to some thousand; a step sees as many "
                    "clips as batch says.")),
                io.Float.Input("learning_rate", default=1e-4, min=1e-7, max=1.0, step=1e-6, round=False, tooltip=(
                    "How much a step changes, 1e-7 to 1. 1e-4 suits a LoRA; it rises over the first tenth of the "
                    "steps, 100 at most, and falls to 0 over the last fifth.")),
                io.Float.Input("audio_learning_rate", default=0.0, min=0.0, max=1.0, step=1e-6, round=False, tooltip=(
                    "The same for the sound's tower, 0 to 1. 0 takes learning_rate; public recipes give the sound "
                    "three times as much.")),
                io.Int.Input("rank", default=32, min=1, max=512, tooltip=(
                    "Size of the change, 1 to 512. More can learn more, and takes more memory and disk.")),
                io.Float.Input("alpha", default=32.0, min=0.01, max=1024.0, step=1.0, tooltip=(
                    "The change counts alpha / rank times, 0.01 to 1024. Keep it equal to rank unless you know why.")),
                io.Combo.Input("towers", options=list(TOWERS), default="both", tooltip=(
                    "Which towers change. audio leaves every weight of the picture's tower alone, and video of the "
                    "sound's.")),
                io.Combo.Input("layers", options=list(LAYER_CHOICES), default="all", tooltip=(
                    "Which layers change. fusion is how the towers read each other, text how they read the caption; "
                    "feed-forward holds most of what a model knows.")),
                io.Int.Input("batch", default=1, min=1, max=64, tooltip=(
                    "Clips of a step, 1 to 64. More makes steps steadier and takes more memory.")),
                share_input("video_given", 0.0, (
                    "Share of the clips whose picture is given, 0 to 1: they teach sound for a picture.")),
                share_input("audio_given", 0.0, (
                    "Share of the clips whose sound is given, 0 to 1: they teach pictures for a sound.")),
                share_input("first_frame", 0.2, (
                    "Share of the clips whose first frame is given, 0 to 1, as 'Ovi First Frame' does.")),
                io.Combo.Input("distribution", options=list(DISTRIBUTIONS), default="logit-normal", advanced=True,
                               tooltip=("How noise levels are drawn. logit-normal prefers the middle ones, uniform "
                                        "takes all alike.")),
                io.Float.Input("shift", default=5.0, min=0.1, max=20.0, step=0.1, advanced=True, tooltip=(
                    "How much of the learning is about the coarse (layout, motion), 0.1 to 20, as when sampling. 1 "
                    "prefers nothing.")),
                share_input("video_share", 0.85, (
                    "Share of the picture in the loss, 0 to 1; the rest is the sound's.")),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=False, tooltip=(
                    "Decides everything random: the same seed and settings give the same LoRA.")),
                io.Int.Input("save_every", default=250, min=0, max=100_000, advanced=True, tooltip=(
                    "Steps from checkpoint to checkpoint, 0 to 100000; the last two are kept, and the LoRA is written "
                    "with each. 0 writes at the end only, or when you cancel.")),
                io.Int.Input("sample_every", default=0, min=0, max=100_000, advanced=True, tooltip=(
                    "Steps from sample to sample, 0 to 100000: a clip of the dataset's captions, always with the same "
                    "noise, as a latent in output/ovi_training for 'Ovi Load Latent'. 0 makes none.")),
                io.Boolean.Input("resume", default=True, tooltip=(
                    "Go on with the last run of this name. Off begins another beside it.")),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA on it, at strength 1."),
                io.String.Output("lora_name", display_name="lora_name", tooltip=(
                    "Its name in the lists of 'Load Ovi LoRA' and 'Load LoRA'; press R to refresh them.")),
                io.String.Output("report", display_name="report", tooltip="What was trained, and where it is."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, dataset, name, learning_rate, audio_learning_rate, layers, **inputs) -> io.NodeOutput:
        require_ovi(model)
        resume = inputs.pop("resume")
        check_inputs(cls, learning_rate=learning_rate, audio_learning_rate=audio_learning_rate, layers=layers, **inputs)
        if not callable(getattr(dataset, "draw", None)):
            raise ValueError(f"dataset of 'Ovi Train LoRA' must come from 'Ovi Dataset', but got {shown(dataset)}.")
        output = Path(folder_paths.get_output_directory())
        place = find_place(name, output / "loras", output / "ovi_training", resume)
        job = make_job(model, learning_rate, audio_learning_rate, LAYER_CHOICES[layers], inputs)
        begun = time.monotonic()
        outcome = train_lora(model, dataset, job, place, Display(later(cls), job.settings.steps))
        lines = [*outcome.lines, f"Took {duration(time.monotonic() - begun)}. Written to output/loras; press R, and "
                 "'Load Ovi LoRA' lists it.", f"Checkpoints and log: output/ovi_training/{place.folder.name}"]
        return io.NodeOutput(with_lora(model, place), place.lora.name, "\n".join(lines), ui=report(cls, lines, []))


def make_job(model, learning_rate: float, audio_learning_rate: float, layers: tuple[str, ...], inputs: dict) -> LoraJob:
    """What a node's inputs ask for."""
    steps = inputs["steps"]
    variant = model.get_attachment(VARIANT_KEY)
    return LoraJob(
        settings=Settings(steps, learning_rate, audio_learning_rate or None, warmup=min(100, max(1, steps // 10)),
                          tail=steps // 5, video_share=inputs["video_share"], seed=inputs["seed"]),
        lora=LoraSettings(inputs["rank"], inputs["alpha"], inputs["towers"], layers),
        levels=Levels(inputs["distribution"], inputs["shift"]),
        switches=Switches(inputs["video_given"], inputs["audio_given"], inputs["first_frame"]),
        batch=inputs["batch"], save_every=inputs["save_every"], samples=SampleSettings(inputs["sample_every"]),
        metadata={VARIANT_KEY: variant} if variant else {})


class Display:
    """Shows how far a run is on its node, and ends the run when it is cancelled."""

    def __init__(self, show, steps: int) -> None:
        self.show, self.bar, self.shown = show, comfy.utils.ProgressBar(steps), 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self.shown > SHOWN_EVERY:
            self.shown = now
            self.show(str(progress))
        self.bar.update_absolute(progress.result.step + 1, progress.steps)
        comfy.model_management.throw_exception_if_processing_interrupted()


def with_lora(model, place: Place):
    """The model with the LoRA of a place on it."""
    found = read_lora(model.model, load_weights(str(place.lora))[0], printable(place.lora.name))
    return apply_lora(model, found, dict.fromkeys(GROUPS, 1.0))
