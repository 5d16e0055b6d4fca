"""One transformer step, ours and the reference's side by side: `compare_reference.py --reference CHECKOUT`.

Same process, weights, inputs and attention kernel (PyTorch's). The results are compared first; then both are timed in
turn. By default a reduced size that a CPU runs in float32; on a CUDA device the full size in bf16, where the reference
uses flash-attn if it is installed. FLOP are counted as each side runs them, and their share is of the device's matmul
peak in the same rounds. Needs a checkout of character-ai/Ovi and the packages diffusers and ftfy.
"""

import importlib.util
import sys
from pathlib import Path

import measure
import subjects
import torch


def build(reference: Path, subject: subjects.Subject, device: torch.device):
    """Return (the reference's model, ours, whether it has flash-attn), with the same random weights."""
    import comfy.sd
    from ovi_native.ovi_model.ovi import layouts
    from reference import make_reference

    packages = ("flash_attn", "flash_attn_interface")
    has_flash = device.type == "cuda" and any(importlib.util.find_spec(name) for name in packages)
    sizes = {"dim": 128 * subject.heads, "num_heads": subject.heads, "num_layers": subject.blocks,
             "ffn_dim": subject.ffn, "text_dim": subject.text}
    theirs = make_reference(reference, sizes, subject.dtype, device, replace_attention=not has_flash)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in theirs.named_parameters():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.data.normal_(gain, 0.02 if weight.ndim > 1 else 0.1, generator=generator)
    weights, _ = layouts.read_towers(dict(theirs.state_dict()), {}, "reference")
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": subject.dtype})
    return theirs, patcher.model.diffusion_model.to(device), has_flash


def make_steps(theirs, ours, subject: subjects.Subject, device: torch.device) -> dict:
    """Return {"reference", "ours"}: a pass of each on the same inputs."""
    latents, t, context = subjects.make_inputs(subject, device)

    def reference():
        with torch.autocast(device.type, dtype=subject.dtype, enabled=subject.dtype != torch.float32):
            out = theirs(vid=[latents[0][0]], audio=[latents[1][0].T], t=t, vid_context=[context[0]],
                         audio_context=[context[0]], vid_seq_len=subject.tokens, audio_seq_len=subject.audio)
        return out[0][0], out[1][0]

    def step():
        video, audio = ours(latents, t, context, {})
        return video[0], audio[0].T

    return {"reference": reference, "ours": step}


def main(argv: list[str] | None = None) -> int:
    parser = measure.arguments(__doc__, runs=9)
    parser.add_argument("--reference", type=Path, required=True, help="checkout of character-ai/Ovi")
    args = parser.parse_args(argv)
    device = subjects.prepare()
    subject = subjects.choose(device, args.quick)
    theirs, ours, has_flash = build(args.reference, subject, device)
    with torch.no_grad():
        actions = make_steps(theirs, ours, subject, device)
        pair = zip(actions["reference"](), actions["ours"](), strict=True)
        errors = [float((a - b).norm() / a.norm()) for a, b in pair]
        flop = {name: measure.count_flop(actions[name]) for name in actions}
        matmul = measure.Matmul(device, subject.dtype, args.quick)
        timings = measure.alternate({**actions, "matmul": matmul}, args.runs)
    rows = []
    for name, work in flop.items():
        shares = measure.Spread.of(work / matmul.flop * peak / step
                                   for peak, step in zip(timings["matmul"], timings[name], strict=True))
        rows.append({"step": name, "seconds": timings.seconds(name),
                     "over the reference": timings.ratio(name, "reference"),
                     "fastest over fastest": min(timings[name]) / min(timings["reference"]), "GFLOP": work / 1e9,
                     "share of matmul peak": shares})
    print(subject.describe())
    print(f"relative L2 difference: video {errors[0]:.2g}, audio {errors[1]:.2g}; "
          f"reference on {'flash-attn' if has_flash else 'PyTorch attention'}")
    measure.show("one transformer step", rows)
    measure.finish("compare_reference", {
        "subject": subject.describe(), "video_error": errors[0], "audio_error": errors[1],
        "reference_attention": "flash-attn" if has_flash else "PyTorch", "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
