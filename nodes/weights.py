"""Weight files node: which ones a workflow needs, and which are here. It never downloads while a graph runs."""

from comfy_api.latest import io

from ..ovi_model.files.catalogue import bytes_to_fetch, missing, unpinned
from ..ovi_model.files.disk import human
from ..ovi_model.ovi.catalogue import DEFAULT_PRECISION, PRECISIONS, restricted
from ..ovi_model.ovi.needs import needs
from ..ovi_model.ovi.variants import DEFAULT_VARIANT, VARIANTS
from .report import report


class OviWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviWeights",
            display_name="Ovi Weights",
            search_aliases=["download models", "missing models", "model manager", "licence", "license",
                            "hugging face"],
            category="Ovi/loaders",
            description="Lists the weight files that an Ovi workflow needs and which of them are in ComfyUI's folders, "
                        "with their licences. Its button downloads the missing ones; running a workflow never does.",
            inputs=[
                io.Combo.Input("variant", options=list(VARIANTS), default=DEFAULT_VARIANT, tooltip=(
                    "The Ovi checkpoint to use: 5 s at 720x720 pixels, 5 s or 10 s at 960x960.")),
                io.Combo.Input("precision", options=list(PRECISIONS), default=DEFAULT_PRECISION,
                               tooltip=(
                    "Which model file to download: bf16 (23.3 GB) is the release, fp8 (12 GB) loses some quality. A "
                    "model file of the variant that is here already counts, whatever its precision.")),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, variant, precision):
        return tuple(need.line() for need in needs(variant, precision))

    @classmethod
    def execute(cls, variant, precision) -> io.NodeOutput:
        listed = needs(variant, precision)
        absent = missing(listed)
        lines, warnings = [need.line() for need in listed], []
        lines += filter(None, [restricted(need.file for need in listed)])
        if absent:
            lines += filter(None, [unpinned(absent)])
            warnings = [f"{len(absent)} of {len(listed)} files are missing; 'Download missing files' on this node "
                        f"fetches {human(bytes_to_fetch(listed))}."]
        return io.NodeOutput(ui=report(cls, lines, warnings))
