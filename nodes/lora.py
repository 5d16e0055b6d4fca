"""LoRA for a model with two towers: under any names, with a strength for each tower and for what each reads."""

import folder_paths
from comfy_api.latest import io

from ..ovi_model.files.names import printable
from ..ovi_model.files.reader import load_weights
from ..ovi_model.ovi.lora_keys import GROUPS, ROOT, LoraPatches, apply_lora, layer_of, read_lora, some
from .inputs import check_inputs, file_path
from .loaders import stamps
from .report import report
from .sampling import require_ovi

TITLES = dict(zip(GROUPS, ("picture", "sound", "sound to picture", "picture to sound"), strict=True))


def multiplier_input(name: str, what: str):
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.05, optional=True, advanced=True, tooltip=(
        f"Multiplies the strength for {what}, -10 to 10. 1 is as trained, 0 leaves these layers alone."))


class OviLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviLoraLoader",
            display_name="Load Ovi LoRA",
            search_aliases=["load lora", "loha", "lokr", "dora", "style"],
            category="Ovi/loaders",
            description="Puts a LoRA on an Ovi model, whichever tool wrote it, and shows what it acts on.",
            inputs=[
                io.Model.Input("model", tooltip="An Ovi model from 'Load Ovi Model', other LoRA on it or not."),
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras"), tooltip=(
                    "LoRA in models/loras for Ovi or Wan2.2 5B (which acts on the picture), under the names of Ovi, "
                    "Wan, diffusers, PEFT, kohya or ComfyUI; also LoHa, LoKr, DoRA and full differences.")),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=(
                    "How strongly the LoRA acts, -10 to 10. 1 is as trained, 0 leaves the model as it is.")),
                multiplier_input("video", "the layers of the picture's tower"),
                multiplier_input("audio", "the layers of the sound's tower"),
                multiplier_input("sound_to_picture", "the layers with which the picture reads the sound"),
                multiplier_input("picture_to_sound", "the layers with which the sound reads the picture"),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA on it, for another one or any sampler.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name=None, **_):
        return stamps("loras", lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength, video=1.0, audio=1.0, sound_to_picture=1.0,
                picture_to_sound=1.0) -> io.NodeOutput:
        require_ovi(model)
        multipliers = dict(zip(GROUPS, (video, audio, sound_to_picture, picture_to_sound), strict=True))
        check_inputs(cls, strength=strength, **multipliers)
        strengths = {group: strength * value for group, value in multipliers.items()}
        if not any(strengths.values()):
            return io.NodeOutput(model, ui=report(cls, ["strength 0: the model is unchanged"], []))
        path = file_path("loras", lora_name)
        name = printable(lora_name)
        found = read_lora(model.model, load_weights(path)[0], name)
        return io.NodeOutput(apply_lora(model, found, strengths), ui=report(cls, *describe(found, strengths, name)))


def describe(found: LoraPatches, strengths: dict[str, float], name: str) -> tuple[list[str], list[str]]:
    """What a LoRA acts on, one line a group, and warnings about what of it came to nothing."""
    counts = {group: len(found.layers(group)) for group in GROUPS}
    lines = [f"{name}: {counted(sum(counts.values()), 'layer')}"]
    for group, count in counts.items():
        acts = f", strength {strengths[group]:g}" if strengths[group] else ", left alone"
        lines.append(f"{TITLES[group]}: {counted(count, 'layer')}{acts if count else ''}")
    warnings = []
    if not any(count and strengths[group] for group, count in counts.items()):
        warnings.append("Nothing is changed: the strength is 0 for all that this LoRA acts on.")
    if found.misfits:
        layers = [f"{layer_of(key).removeprefix(ROOT)} {list(shape) if shape else ''}".strip()
                  for key, shape in found.misfits.items()]
        warnings.append(f"Skipped, of another shape in this model: {counted(len(layers), 'layer')} ({some(layers)}).")
    if found.unmatched:
        warnings.append(f"Skipped, of no layer in this model: {counted(len(found.unmatched), 'name')} in the file "
                        f"({some(found.unmatched)}).")
    return lines, warnings


def counted(number: int, what: str) -> str:
    """A number of things, for people."""
    return f"{number} {what}{'' if number == 1 else 's'}"
