"""Faults of a prompt are said before anything is loaded for it, by the real server."""

import pytest
from devlib.client import ExecutionError, RejectedError
from devlib.graphs import change, forget, node, text_to_av
from ovi_native.nodes.prompt import OviPrompt


def asking(scene, audio_caption="a low hum"):
    """A graph that ends with the prompt's text."""
    graph = change(text_to_av(), prompt={"scene": scene, "audio_caption": audio_caption})
    return graph | {"show": node("PreviewAny", source=["prompt", 2])}


@pytest.mark.parametrize("scene, sentence", [
    ("He says <S>hello.", "<S> is never closed: add <E> after its words."),
    ("He says hello.<E>", "<E> has no <S> before it."),
    ("He says <s>hello.<e>", "<s> is read as plain text: tags are exactly"),
    ("He says &lt;S&gt;hello.", "<S> is never closed"),
    ("Rain. <AUDCAP>drops", "<AUDCAP> is never closed"),
])
def test_broken_tags_are_refused_before_the_run(comfy_client, scene, sentence):
    with pytest.raises(RejectedError) as error:
        comfy_client.queue(asking(scene))
    reason, = error.value.reasons  # once, at the input where the fault is
    assert reason["extra_info"]["input_name"] == "scene" and sentence in reason["details"]


def test_what_may_be_meant_is_no_reason_to_stop():
    for scene in ("", "He says <S>hello.<E>", "a < b > c", 'She says "come in now".', "Rain. <audcap>drops</audcap>"):
        assert OviPrompt.validate_inputs(scene) is True
    assert OviPrompt.validate_inputs(None) is True


def test_a_linked_scene_is_checked_before_the_encoder_is_loaded(comfy_client):
    forget(comfy_client)
    linked = asking(["words", 0]) | {"words": node("PrimitiveStringMultiline", value="He says <S>hello.")}
    seen = []

    def note(kind, data):
        if isinstance(data, bytes) and b"is never closed" in data:  # the text on the node
            seen.append("said")
        elif kind == "executing" and data.get("node") == "clip":
            seen.append("loaded")

    assert comfy_client.run(linked, on_event=note).status == "success"
    assert seen == ["said", "loaded", "said"], "and once more with what else is known then"


def test_a_caption_given_twice_is_said_before_the_encoder_is_loaded(comfy_client):
    forget(comfy_client)
    seen = []
    with pytest.raises(ExecutionError, match="audio caption is given twice"):
        comfy_client.run(asking("Rain. Audio: drops"), on_event=lambda kind, data: seen.append((kind, data)))
    assert "clip" not in [data.get("node") for kind, data in seen if kind == "executing"]
