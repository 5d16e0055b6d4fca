"""Patches that nodes leave in a MODEL's options: which of them Ovi's network heeds, and which change nothing.

Core's network of Wan, of which Ovi's towers are made, offers nodes one place inside a block, after self-attention
(`attn1_patch`), and the network as a whole lets a block be replaced. UNets and other networks offer many more; a node
made for those leaves a patch that is never called.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

OUTPUT, WAN_OUTPUT = "attn1_output_patch", "attn1_patch"
HEEDED = (WAN_OUTPUT, OUTPUT)


def patches_of(transformer_options: dict, blocks: int) -> Iterator[tuple[Any, str, bool]]:
    """All patches in the options as (function, name of its place, whether Ovi has that place)."""
    for name, patches in transformer_options.get("patches", {}).items():
        yield from ((patch, name, name in HEEDED) for patch in patches)
    for kind, replacements in transformer_options.get("patches_replace", {}).items():
        for place, patch in replacements.items():
            block, number = place[0], place[1]
            heeded = kind == "dit" and block == "double_block" and number in range(blocks)
            yield patch, f"{'' if kind == 'dit' else f'{kind} of '}{block} {number}", heeded


def name_of(patch: Any) -> str:
    """The node that made a function: core's and most packs' nodes define it in a method of the node's class."""
    patch = getattr(patch, "func", patch)
    return getattr(patch, "__qualname__", type(patch).__qualname__).split(".")[0]


def idle_patches(transformer_options: dict, blocks: int) -> str | None:
    """One sentence that names what in a MODEL's options changes nothing in Ovi; None if all of it does.

    A node that patches several places, some of which exist, has an effect.
    """
    heeded: set[str] = set()
    idle: dict[str, list[str]] = {}
    for patch, place, exists in patches_of(transformer_options, blocks):
        if exists:
            heeded.add(name_of(patch))
        else:
            idle.setdefault(name_of(patch), []).append(place)
    names = [f"{name} ({', '.join(dict.fromkeys(places))})" for name, places in idle.items() if name not in heeded]
    if not names:
        return None
    return (f"Without effect on Ovi: {'; '.join(names)}. Ovi's network lacks the places that this MODEL's patches are "
            f"for; it has the double blocks 0 to {blocks - 1} and the output of self-attention. Take their nodes out.")


def offer_attention_outputs(options: dict) -> None:
    """Call patches on the output of self-attention, as core's 'NAGuidance' sets them, where Wan's network offers it."""
    transformer_options = options.get("transformer_options", {})
    patches = transformer_options.get("patches", {})
    if patches.get(OUTPUT):
        adapted = [partial(patch_output, patch) for patch in patches[OUTPUT]]
        options["transformer_options"] = {**transformer_options, "patches": {
            **patches, WAN_OUTPUT: [*patches.get(WAN_OUTPUT, []), *adapted]}}


def patch_output(patch: Callable, args: dict):
    """Hand the output of self-attention [B, N, D] to a patch as other networks do."""
    heads, width = args["q"].shape[2:]
    return patch(args["x"], {**args["transformer_options"], "n_heads": heads, "dim_head": width})
