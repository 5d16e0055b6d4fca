"""Speed nodes: another attention backend, and less work for a little error. Each takes a MODEL and gives one."""

from dataclasses import dataclass

from comfy_api.latest import io

from ..ovi_model.sampling import attention_backend, guidance, step_cache
from .inputs import check_inputs
from .report import later, report
from .sampling import require_ovi


@dataclass(frozen=True)
class Preset:
    """What 'Ovi Fast' sets: attention backends in order of preference, and the step cache."""

    backends: tuple[str, ...]
    cache: step_cache.Settings


PRESETS = {
    "balanced": Preset(("flash 3",), step_cache.Settings(0.07, 0.07, 0.15, 0.95)),
    "fast": Preset(("flash 3", "sage"), step_cache.Settings(0.15, 0.15, 0.15, 0.95)),
}
"""Guidance on part of the steps is in neither: it changes the result ten times as much for the time it saves."""


def model_input():
    return io.Model.Input("model", tooltip="An Ovi model from 'Load Ovi Model', with or without LoRA on it.")


def model_output():
    return io.Model.Output(tooltip="The same model, faster, for any sampler.")


def percent_inputs(what: str, start: float, end: float):
    return [
        io.Float.Input("start_percent", default=start, min=0.0, max=1.0, step=0.01, tooltip=(
            f"Share of the steps after which {what} begins, 0 to 1. 0 is from the first step.")),
        io.Float.Input("end_percent", default=end, min=0.0, max=1.0, step=0.01, tooltip=(
            f"Share of the steps at which {what} ends, 0 to 1. 1 is after the last step.")),
    ]


def place_of(model):
    """Where and in which precision the model computes."""
    return model.load_device, model.model.get_dtype_inference()


class OviAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviAttention",
            display_name="Ovi Attention",
            search_aliases=["sage attention", "flash attention", "xformers", "speed", "sdpa"],
            category="Ovi/speed",
            description="Chooses the attention backend of this model, and says at once if the machine lacks it.",
            inputs=[
                model_input(),
                io.Combo.Input("backend", options=["auto", *attention_backend.BACKENDS], default="auto", tooltip=(
                    "auto is what ComfyUI uses for every model. flash 2, flash 3, pytorch and xformers are exact; sage "
                    "and sage 3 round to 8 and 4 bits for speed. sub-quadratic saves memory where PyTorch has no "
                    "fast one. What is not installed is refused with what to install.")),
            ],
            outputs=[model_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, backend) -> io.NodeOutput:
        require_ovi(model)
        if backend == "auto":
            model = attention_backend.set_attention(model, backend)
            return io.NodeOutput(model, ui=report(cls, ["ComfyUI's choice"], []))
        device, dtype = place_of(model)
        attention_backend.check(backend, device, dtype)
        line = f"{attention_backend.BACKENDS[backend].title} on {device}"
        return io.NodeOutput(attention_backend.set_attention(model, backend), ui=report(cls, [line], []))


class OviStepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def threshold(name: str, stream: str):
            return io.Float.Input(name, default=0.1, min=0.0, max=3.0, step=0.01, tooltip=(
                f"Expected relative change of the {stream}'s prediction, 0 to 3, below which a step may be skipped. "
                "0 skips none; higher is faster and less exact. Both streams must be below theirs."))

        return io.Schema(
            node_id="OviStepCache",
            display_name="Ovi Step Cache",
            search_aliases=["teacache", "easycache", "first block cache", "fbcache", "speed", "skip steps"],
            category="Ovi/speed",
            description="Skips the model passes of steps in which neither picture nor sound would change much.",
            inputs=[model_input(), threshold("video_threshold", "picture"), threshold("audio_threshold", "sound"),
                    *percent_inputs("skipping", 0.15, 0.95)],
            outputs=[model_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, video_threshold, audio_threshold, start_percent, end_percent) -> io.NodeOutput:
        require_ovi(model)
        check_inputs(cls, video_threshold=video_threshold, audio_threshold=audio_threshold)
        settings = step_cache.Settings(video_threshold, audio_threshold, start_percent, end_percent)
        return io.NodeOutput(step_cache.set_step_cache(model, settings, later(cls)))


class OviGuidanceRange(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviGuidanceRange",
            display_name="Ovi Guidance Range",
            search_aliases=["cfg range", "guidance interval", "cfg interval", "speed"],
            category="Ovi/speed",
            description="Runs the negative pass in a part of the steps only; the others take half the time and are not "
                        "guided.",
            inputs=[model_input(), *percent_inputs("guidance", 0.0, 0.8)],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, start_percent, end_percent) -> io.NodeOutput:
        require_ovi(model)
        return io.NodeOutput(guidance.set_guidance_range(model, start_percent, end_percent))


class OviFast(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviFast",
            display_name="Ovi Fast",
            search_aliases=["speed", "faster", "accelerate", "teacache", "turbo"],
            category="Ovi/speed",
            description="Less time for a small error: step cache and the fastest attention backend here. How much "
                        "less depends on how the model behaves; see the help page.",
            inputs=[
                model_input(),
                io.Combo.Input("preset", options=list(PRESETS), default="balanced", tooltip=(
                    "balanced skips fewer steps and keeps attention exact; fast skips more, and takes "
                    "SageAttention where FlashAttention 3 is not to be had. The help page says more.")),
            ],
            outputs=[model_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, preset) -> io.NodeOutput:
        require_ovi(model)
        check_inputs(cls, preset=preset)
        chosen = PRESETS[preset]
        backend = next((name for name in chosen.backends if attention_backend.works(name, *place_of(model))), None)
        lines = [f"Attention: {backend or 'not changed'}",
                 f"Step cache: thresholds {chosen.cache.video_threshold} and {chosen.cache.audio_threshold}"]
        if backend is not None:
            model = attention_backend.set_attention(model, backend)
        show = later(cls)  # what the run did comes first: the node does not grow for one more line
        model = step_cache.set_step_cache(model, chosen.cache, lambda text: show("\n".join([text, *lines])))
        return io.NodeOutput(model, ui=report(cls, lines, []))
