"""Sampling nodes: everything in one, and the same parts for SamplerCustomAdvanced and the stock samplers."""

import time

from comfy_api.latest import io
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

from ..ovi_model.ovi.conditioning import text_tokens_cut
from ..ovi_model.ovi.guider import (
    make_guider,
    overridden,
    overridden_schedule,
    set_audio_guidance,
    set_skip_layer,
)
from ..ovi_model.ovi.model_base import OviBaseModel
from ..ovi_model.ovi.variants import VARIANT_KEY, disagreements
from ..ovi_model.sampling import solvers
from .inputs import check_inputs
from .preview import took
from .report import report

MAX_SEED = 0xFFFFFFFFFFFFFFFF


def require_ovi(model) -> None:
    """Raise ValueError unless MODEL is an Ovi model."""
    if not isinstance(model.model, OviBaseModel):
        raise ValueError(f"This node needs an Ovi model, but got {type(model.model).__name__}. "
                         "Connect 'Load Ovi Model' (LoRA and other model patches may sit in between).")


def agreement(model, positive, latent) -> list[str]:
    """Warnings where prompt or latent were made for another variant than the model."""
    prompt = next((options.get(VARIANT_KEY) for _, options in positive), None)
    return disagreements(model.get_attachment(VARIANT_KEY), prompt, latent.get(VARIANT_KEY))


def steps_input():
    return io.Int.Input("steps", default=50, min=1, max=1000, tooltip=(
        "How often the noise is reduced, 1 to 1000. Time grows in proportion; Ovi's own setting is 50."))


def solver_input():
    return io.Combo.Input("solver", options=list(solvers.SOLVERS), default="unipc", tooltip=(
        "How one step leads to the next: unipc (Ovi's own setting), dpm++ or euler, each exactly as in Ovi's program."))


def shift_input():
    return io.Float.Input("shift", default=5.0, min=0.1, max=100.0, step=0.1, tooltip=(
        "How long sampling stays with the coarse, 0.1 to 100: higher values spend more steps on layout and motion, "
        "lower ones on detail. Ovi's own setting is 5."))


def denoise_input():
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=(
        "Share of the schedule that is run, 0 to 1. Below 1 the given latent is kept in part: 0.4 changes details, 0.8 "
        "nearly everything. Needs a latent with content."))


def video_guidance_input():
    return io.Float.Input("video_guidance", default=4.0, min=0.0, max=100.0, step=0.1, tooltip=(
        "Guidance scale of the picture, 0 to 100: how strongly it follows the prompt and avoids the negative one. 1 is "
        "no guidance; Ovi's own setting is 4."))


def audio_guidance_input():
    return io.Float.Input("audio_guidance", default=3.0, min=0.0, max=100.0, step=0.1, tooltip=(
        "Guidance scale of the sound, 0 to 100, independent of the picture's: how strongly it follows the prompt and "
        "avoids the negative one. 1 is no guidance; Ovi's own setting is 3."))


def skip_layer_input():
    return io.Int.Input("skip_layer", default=11, min=-1, max=999, tooltip=(
        "A layer left out where the model works out what to avoid: that gets worse without it, and the result keeps "
        "further away from it (skip-layer guidance). Its number, 0 to the model's last, or -1 for none; Ovi's own "
        "setting is 11 of 30."))


def seed_input():
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=(
        "Start of the random noise for picture and sound. The same seed and settings give the same clip; seeds that "
        "share their low 32 bits give the same noise."))


class OviSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviSampler",
            display_name="Ovi Sampler",
            search_aliases=["text to video", "image to video", "audio video", "video with sound", "veo", "sora",
                            "talking", "speech", "lip sync", "sound", "ksampler", "generate video"],
            category="Ovi/sampling",
            description="Generates picture and sound together, with the solver, schedule and guidance of Ovi's own "
                        "program.",
            inputs=[
                io.Model.Input("model", tooltip="An Ovi model from 'Load Ovi Model', with or without LoRA on it."),
                io.Conditioning.Input("positive", tooltip="What to generate, from 'Ovi Prompt'."),
                io.Conditioning.Input("negative", tooltip="What to avoid, from 'Ovi Prompt'; its audio part is used."),
                io.Latent.Input("latent", tooltip="Size and length, from 'Ovi Empty Latent' or 'Ovi First Frame'."),
                seed_input(), steps_input(), solver_input(), shift_input(), video_guidance_input(),
                audio_guidance_input(), skip_layer_input(), denoise_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Finished picture and sound, for 'Ovi Decode'.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, seed, steps, solver, shift, video_guidance, audio_guidance,
                skip_layer, denoise) -> io.NodeOutput:
        require_ovi(model)
        check_inputs(cls, latent=latent, seed=seed, video_guidance=video_guidance, audio_guidance=audio_guidance,
                     skip_layer=skip_layer)
        warnings = [*agreement(model, positive, latent), *text_tokens_cut([*positive, *negative]),
                    *overridden_schedule(model, shift),
                    *overridden(model, negative, audio_guidance, skip_layer)]
        guider = make_guider(model, positive, negative, video_guidance, audio_guidance, skip_layer,
                                      warnings.append)
        sigmas = solvers.make_sigmas(solver, steps, shift, denoise)
        begun = time.perf_counter()
        result = SamplerCustomAdvanced.execute(
            Noise_RandomNoise(seed), guider, solvers.make_sampler(solver), sigmas, latent)
        lines = [took(len(sigmas) - 1, time.perf_counter() - begun, seed)]
        return io.NodeOutput(result.result[0], ui=report(cls, lines, warnings))


class OviGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviGuider",
            display_name="Ovi Guider",
            search_aliases=["cfg guider", "audio cfg", "dual cfg", "guidance"],
            category="Ovi/sampling",
            description="Guidance with one scale for the picture and one for the sound, for SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("model", tooltip="An Ovi model from 'Load Ovi Model'."),
                io.Conditioning.Input("positive", tooltip="What to generate, from 'Ovi Prompt'."),
                io.Conditioning.Input("negative", tooltip="What to avoid, from 'Ovi Prompt'."),
                video_guidance_input(), audio_guidance_input(), skip_layer_input(),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, positive, negative, video_guidance, audio_guidance, skip_layer) -> io.NodeOutput:
        require_ovi(model)
        check_inputs(cls, video_guidance=video_guidance, audio_guidance=audio_guidance, skip_layer=skip_layer)
        guider = make_guider(model, positive, negative, video_guidance, audio_guidance, skip_layer)
        warnings = overridden(model, negative, audio_guidance, skip_layer)
        return io.NodeOutput(guider, ui=report(cls, [], warnings) if warnings else None)


class OviAudioGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviAudioGuidance",
            display_name="Ovi Audio Guidance",
            search_aliases=["audio cfg", "sound guidance", "cfg"],
            category="Ovi/sampling",
            description="Gives the sound a guidance scale of its own under any stock sampler; the sampler's cfg then "
                        "guides the picture alone.",
            inputs=[
                io.Model.Input("model", tooltip="An Ovi model from 'Load Ovi Model'."),
                audio_guidance_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model for KSampler, CFGGuider and the like.")],
        )

    @classmethod
    def execute(cls, model, audio_guidance) -> io.NodeOutput:
        require_ovi(model)
        check_inputs(cls, audio_guidance=audio_guidance)
        return io.NodeOutput(set_audio_guidance(model, audio_guidance))


class OviSkipLayer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviSkipLayer",
            display_name="Ovi Skip Layer",
            search_aliases=["skip layer guidance", "slg", "stg", "perturbed"],
            category="Ovi/conditioning",
            description="Skips one block wherever this conditioning is used. Put it on the negative prompt of a "
                        "stock sampler for skip-layer guidance.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="Usually the negative output of 'Ovi Prompt'."),
                skip_layer_input(),
            ],
            outputs=[io.Conditioning.Output(tooltip="The same conditioning, with the block skipped.")],
        )

    @classmethod
    def execute(cls, conditioning, skip_layer) -> io.NodeOutput:
        check_inputs(cls, skip_layer=skip_layer)
        return io.NodeOutput(set_skip_layer(conditioning, skip_layer))


class OviSolver(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviSolver",
            display_name="Ovi Solver",
            search_aliases=["sampler select", "unipc", "dpm++", "euler"],
            category="Ovi/sampling",
            description="The reference's solvers as a SAMPLER, exact to rounding. Core's solvers of similar names "
                        "differ by about 1 %.",
            inputs=[solver_input()],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced; use 'Ovi Schedule' with the same solver.")],
        )

    @classmethod
    def execute(cls, solver) -> io.NodeOutput:
        return io.NodeOutput(solvers.make_sampler(solver))


class OviSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviSchedule",
            display_name="Ovi Schedule",
            search_aliases=["scheduler", "sigmas", "shift", "flow shift", "steps"],
            category="Ovi/sampling",
            description="The reference's noise levels as SIGMAS. Each solver has its own.",
            inputs=[solver_input(), steps_input(), shift_input(), denoise_input()],
            outputs=[io.Sigmas.Output(tooltip="Noise levels from about 1 down to 0.")],
        )

    @classmethod
    def execute(cls, solver, steps, shift, denoise) -> io.NodeOutput:
        return io.NodeOutput(solvers.make_sigmas(solver, steps, shift, denoise))
