"""Files that once ended ComfyUI's worker, in the real server: a sentence on the node, and the next graph runs."""

import os
import sys
from pathlib import Path

import pytest
from devlib import graphs
from devlib.client import ExecutionError
from devlib.graphs import change, node, run_latents, save_latents, text_to_av
from devlib.weights import MODELS, TINY_FILES

WORKS = change(text_to_av(), sampler={"steps": 1})
NO_END = b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'


def refusal(client, graph, at) -> str:
    with pytest.raises(ExecutionError) as stopped:
        client.run(save_latents(graph))
    assert stopped.value.event["node_id"] == at and stopped.value.event["exception_type"] == "RuntimeError"
    return stopped.value.message


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
@pytest.mark.parametrize("name", [b"good\xff.safetensors", b"two\nlines.safetensors"])
def test_a_name_that_is_no_text(comfy_client, tiny_models, name):
    folder, whole = TINY_FILES["model"]
    path = Path(os.fsdecode(os.fsencode(tiny_models / folder) + b"/" + name))
    os.symlink(MODELS / folder / whole, path)
    try:
        comfy_client.object_info()  # reads the folders again
        broken = change(WORKS, model={"model_name": path.name})
        if b"\xff" in name:
            assert r"good\xff.safetensors cannot be opened" in refusal(comfy_client, broken, "model")
        weights = {"weights": node("OviWeights", variant="960x960_5s", precision="bf16")}
        comfy_client.run(weights)
        path.unlink()
        path.write_bytes(b"<html>")
        shown = name.decode("latin-1").replace("\xff", r"\xff").replace("\n", r"\n")
        assert f"{shown} is a web page" in refusal(comfy_client, broken, "model")
    finally:
        path.unlink()
    assert run_latents(comfy_client, WORKS)


def test_a_tokenizer_without_an_end(comfy_client, tiny_models):
    with graphs.added(tiny_models, {"text_encoders/tokenizer.json": NO_END}):
        broken = change(WORKS, clip={"tokenizer_name": "tokenizer.json"})
        assert "its model is 'BPE' instead of 'Unigram'" in refusal(comfy_client, broken, "clip")
    assert run_latents(comfy_client, WORKS)
