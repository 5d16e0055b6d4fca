"""Prompt node: scene, speech and soundtrack to positive and negative CONDITIONING."""

from comfy_api.latest import io

from ..ovi_model.ovi import prompt
from ..ovi_model.ovi.conditioning import AUDIO_TEXT_KEY
from ..ovi_model.ovi.variants import DEFAULT_VARIANT, VARIANT_KEY, VARIANTS, get_variant
from ..ovi_model.text import umt5
from .report import report

DEFAULT_SCENE = (
    "A woman in a yellow raincoat stands on a pier at dawn, her hair moving in the wind. She turns to the camera, "
    "smiles and says, <S>The tide waits for nobody.<E> She looks back at the sea. "
    "Audio: clear, calm female voice, close; waves against wood, distant gulls, light wind."
)
VIDEO_NEGATIVE = "jitter, bad hands, blur, distortion"
AUDIO_NEGATIVE = "robotic, muffled, echo, distorted"
SHOWN_CUT = 160  # characters of a cut text shown on the node


class OviPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviPrompt",
            display_name="Ovi Prompt",
            search_aliases=["text to video", "text to audio", "speech", "talking", "lip sync", "dialogue", "voice",
                            "caption", "clip text encode", "negative prompt", "soundtrack"],
            category="Ovi/conditioning",
            description="Writes the prompt the way the chosen Ovi checkpoint was trained on, encodes it, and adds "
                        "separate negative prompts for picture and sound.",
            inputs=[
                io.Clip.Input("clip", lazy=True, tooltip=(
                    "UMT5-XXL from 'Load Ovi Text Encoder' (or 'Load CLIP', type wan).")),
                io.String.Input("scene", multiline=True, dynamic_prompts=False, default=DEFAULT_SCENE, tooltip=(
                    "What is seen and who says what, about 100 to 300 words. Put spoken words between <S> and <E>; "
                    "<AUDCAP>...<ENDAUDCAP> or 'Audio: ...' at the end may describe the sound here instead of in "
                    "audio_caption. Brackets have no weight meaning. Up to 512 tokens with the caption.")),
                io.Combo.Input("variant", options=list(VARIANTS), default=DEFAULT_VARIANT, tooltip=(
                    "Which of Ovi's three releases the model file is; 'Load Ovi Model' knows. It decides how the audio "
                    "caption is written: <AUDCAP>...<ENDAUDCAP> for 720x720_5s, 'Audio: ...' for the two others.")),
                io.String.Input("audio_caption", multiline=True, dynamic_prompts=False, default="",
                                optional=True, tooltip=(
                    "What is heard: voices, effects, music, room. Added after the scene in the variant's style. Leave "
                    "empty when the scene already has its audio caption; having both is an error.")),
                io.String.Input("video_negative", multiline=True, dynamic_prompts=False, default=VIDEO_NEGATIVE,
                                optional=True, tooltip=(
                    "What the picture should move away from, up to 512 tokens. Works while video guidance is not 1.")),
                io.String.Input("audio_negative", multiline=True, dynamic_prompts=False, default=AUDIO_NEGATIVE,
                                optional=True, tooltip=(
                    "What the sound should move away from, up to 512 tokens. Works while audio guidance is not 1.")),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt, read by both streams."),
                io.Conditioning.Output(display_name="negative", tooltip=(
                    "The two negative prompts in one conditioning. Works in stock samplers too.")),
                io.String.Output(display_name="text", tooltip=(
                    "The positive prompt as it was encoded: caption in the variant's style, cleaned, before any cut.")),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, scene):
        """Before a run of minutes begins: what nobody can mean. A linked scene is not known yet, and is None."""
        return " ".join(prompt.broken_tags(scene or "")) or True

    @classmethod
    def check_lazy_status(cls, scene, variant, clip=None, audio_caption="", **_):
        """Says what is wrong with the text before the text encoder is loaded."""
        if clip is None:
            report(cls, [], prompt.check_tags(prompt.assemble(scene, audio_caption, get_variant(variant))))
        return ["clip"]

    @classmethod
    def execute(cls, clip, scene, variant, audio_caption="", video_negative=VIDEO_NEGATIVE,
                audio_negative=AUDIO_NEGATIVE) -> io.NodeOutput:
        text = prompt.assemble(scene, audio_caption, get_variant(variant))
        texts = {
            "prompt": text,
            "video_negative": prompt.clean_for_tokenizer(video_negative),  # negatives keep their form, as in the
            "audio_negative": prompt.clean_for_tokenizer(audio_negative),  # reference
        }
        warnings = prompt.check_tags(text)
        once = {each: umt5.encode_conditioning(clip, each) for each in dict.fromkeys(texts.values())}
        encoded = {name: once[each][0] for name, each in texts.items()}
        for name, each in texts.items():
            warnings += truncation_warning(name, once[each][1])
        positive = [[embedded, {**options, VARIANT_KEY: variant}] for embedded, options in encoded["prompt"]]
        negative = [[video, {**options, VARIANT_KEY: variant, AUDIO_TEXT_KEY: audio}] for (video, options), (audio, _)
                    in zip(encoded["video_negative"], encoded["audio_negative"], strict=True)]
        return io.NodeOutput(positive, negative, text, ui=report(cls, [text], warnings))


def truncation_warning(name: str, info: umt5.TextInfo) -> list[str]:
    """One sentence when the text was longer than the encoder reads, with the words that were lost; else nothing."""
    if not info.cut_tokens:
        return []
    lost = info.cut_text[:SHOWN_CUT] + "…" * (len(info.cut_text) > SHOWN_CUT)
    return [f"{name} has {info.tokens + info.cut_tokens} tokens, {umt5.MAX_TOKENS} are read: the last "
            f"{info.cut_tokens} were cut: …{lost}"]
