"""Latent nodes: an empty joint latent of a chosen length and size, and one that starts from an image.

A joint latent is NestedTensor(video [B, 48, T, H/16, W/16], audio [B, 20, A]), video in the VAE's own value range.
"""

from typing import Any

import comfy.latent_formats
import comfy.model_management
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import io

from ..ovi_model.files.disk import human
from ..ovi_model.geometry import area_is_off
from ..ovi_model.media import images
from ..ovi_model.ovi.latents import joint_streams
from ..ovi_model.ovi.supported_models import pass_memory
from ..ovi_model.ovi.variants import (
    ASPECTS,
    DEFAULT_VARIANT,
    GEOMETRY,
    OLD_ASPECTS,
    VARIANT_KEY,
    VARIANTS,
    Variant,
    get_variant,
    size_for,
)
from .decode import check_video_vae
from .inputs import check_inputs, shown
from .report import report

FPS, MULTIPLE = GEOMETRY.fps, GEOMETRY.size_multiple
MAX_SIDE = 8192  # pixels
MAX_SECONDS = 120
MAX_BATCH = 64
MAX_RATIO = 8  # long side to short side
MAX_TOKENS = 20_000_000  # two minutes at 2048x2048; its latent takes 15 GB
MAX_PASS = 141_000_000_000  # bytes that a step may need beside the model: the memory of an H200
MAX_FRAMES = GEOMETRY.frames_from_seconds(MAX_SECONDS)
SIDE = (f"Used with the two custom aspects only, and without effect otherwise. Pixels, {MULTIPLE} and up, snapped to a "
        f"multiple of {MULTIPLE}.")
CUSTOM = "custom"
CUSTOM_RATIO = "custom ratio"
RESIZE_REFERENCE, RESIZE_CROP, RESIZE_STRETCH = "reference", "crop", "stretch"


def variant_input():
    return io.Combo.Input("variant", options=list(VARIANTS), default=DEFAULT_VARIANT, tooltip=(
        "Which of Ovi's three releases the model file is: 720x720 pixels and 5 s, 960x960 and 5 s, or 960x960 and 10 "
        "s. Clips get the area and, unless you say otherwise, the length that it was trained on. 'Load Ovi Model' "
        "knows: connect its output of this name."))


def fps_output():
    return io.Float.Output(display_name="fps", tooltip=f"Frames per second, always {float(FPS)}: for 'Create Video'.")


class OviEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviEmptyLatent",
            display_name="Ovi Empty Latent",
            search_aliases=["text to video", "t2v", "audio video latent", "size", "resolution", "aspect ratio",
                            "duration", "length", "seconds", "batch"],
            category="Ovi/latent",
            description="An empty video and audio latent pair of one length, in a size the model can make.",
            inputs=[
                variant_input(),
                io.Combo.Input("aspect", options=[*ASPECTS, CUSTOM, CUSTOM_RATIO], default=next(iter(ASPECTS)),
                               tooltip=(
                    f"Shape of the picture; its size follows from the variant. {example_sizes()} 'custom' takes width "
                    f"and height as they are, in multiples of {MULTIPLE}; 'custom ratio' takes them for the shape "
                    "only.")),
                io.Int.Input("width", default=1280, min=MULTIPLE, max=MAX_SIDE, step=MULTIPLE, tooltip=SIDE),
                io.Int.Input("height", default=704, min=MULTIPLE, max=MAX_SIDE, step=MULTIPLE, tooltip=SIDE),
                io.Float.Input("seconds", default=0.0, min=0.0, max=float(MAX_SECONDS), step=0.1, tooltip=(
                    "Length in seconds; 0 is what the variant was trained on (5 or 10 s), and best. Others up to "
                    f"{MAX_SECONDS} run, with unknown quality; they are snapped to 4n+1 frames at {FPS} per second.")),
                io.Int.Input("frames", default=0, min=0, max=MAX_FRAMES, step=1, advanced=True, tooltip=(
                    f"Length in frames at {FPS} per second, 1 to {MAX_FRAMES}, snapped to 4n+1; takes the place of "
                    "seconds. 0 to use seconds.")),
                io.Int.Input("batch_size", default=1, min=1, max=MAX_BATCH, tooltip=(
                    "Clips sampled at the same time, 1 to 64, each with noise of its own. Memory grows with it.")),
            ],
            outputs=[
                io.Latent.Output(tooltip=(
                    "Joint latent: picture and sound in one, for 'Ovi Sampler' or a stock sampler. 'Separate AV "
                    "Latent' splits it.")),
                io.Int.Output(display_name="width", tooltip="Width in pixels after snapping."),
                io.Int.Output(display_name="height", tooltip="Height in pixels after snapping."),
                io.Int.Output(display_name="frames", tooltip=f"Video frames after snapping, at {FPS} per second."),
                fps_output(),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, aspect):
        """Core's check of this list, which knows its present labels only."""
        return aspect is None or is_aspect(aspect) or unknown_aspect(aspect)

    @classmethod
    def execute(cls, variant, aspect, width, height, seconds, frames, batch_size) -> io.NodeOutput:
        spec = get_variant(variant)
        check_ranges(width, height, seconds, frames, batch_size)
        asked, (height, width) = clip_size(spec, aspect, height, width)
        latent_frames = choose_latent_frames(spec, seconds, frames)
        check_amount(latent_frames, height, width, batch_size)
        memory = step_memory(spec, latent_frames, height, width, batch_size)
        check_memory(memory, f"{batch_size} x {width}x{height}")
        samples = empty_samples(latent_frames, height, width, batch_size)
        lines = [describe(latent_frames, height, width, GEOMETRY.audio_latents_for(latent_frames))]
        lines += size_notes(spec, aspect, asked, (height, width))
        lines += [f"A step needs about {human(memory)} beside the model"]
        warnings = size_warnings(spec, height, width) + length_warnings(spec, latent_frames) + memory_warnings(memory)
        return io.NodeOutput({"samples": samples, VARIANT_KEY: variant}, width, height,
                             GEOMETRY.frames_from_latent(latent_frames), float(FPS),
                             ui=report(cls, lines, warnings))


class OviFirstFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="OviFirstFrame",
            display_name="Ovi First Frame",
            search_aliases=["image to video", "i2v", "start image", "animate image", "talking head",
                            "lip sync"],
            category="Ovi/latent",
            description="Makes a clip begin with your image: a joint latent (picture and sound in one) whose first "
                        "frame is kept as it is while the rest is sampled.",
            inputs=[
                io.Vae.Input("vae", tooltip=(
                    f"Wan2.2 VAE ({GEOMETRY.video.channels} latent channels) from 'Load Ovi VAEs' or 'Load VAE'.")),
                io.Image.Input("image", tooltip=(
                    "The first frame. A batch needs one image per clip of the given latent; alpha is ignored.")),
                variant_input(),
                io.Combo.Input("resize", options=[RESIZE_REFERENCE, RESIZE_CROP, RESIZE_STRETCH],
                               default=RESIZE_REFERENCE, tooltip=(
                    "How the image becomes a frame. reference: nothing is cut off, and the image's shape becomes the "
                    "clip's, at the variant's area; so does Ovi's own program. crop: the middle of the image, at the "
                    "size of the given latent. stretch: the whole image, pulled to that size. crop and stretch need "
                    "the latent input.")),
                io.Latent.Input("latent", optional=True, tooltip=(
                    "From 'Ovi Empty Latent': gives length and batch size, and the size for crop and stretch. It is "
                    "not changed. Without it: one clip of the variant's trained length.")),
            ],
            outputs=[
                io.Latent.Output(tooltip=(
                    "Joint latent with the image in frame 0, and a noise mask that keeps samplers from changing it.")),
                io.Int.Output(display_name="width", tooltip="Width of the clip in pixels."),
                io.Int.Output(display_name="height", tooltip="Height of the clip in pixels."),
                io.Image.Output(display_name="image", tooltip="The image as resized, clipped to 0..1 for viewing."),
                fps_output(),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, vae, image, variant, resize, latent=None) -> io.NodeOutput:
        check_video_vae(vae)
        spec = get_variant(variant)
        if latent is None:
            clips, latent_frames, audio_latents, size = 1, spec.latent_frames, spec.audio_latents, None
        else:
            check_inputs(cls, latent=latent)
            video, audio = joint_streams(latent, "Ovi First Frame")
            clips, latent_frames, audio_latents = video.shape[0], video.shape[2], audio.shape[2]
            size = GEOMETRY.pixel_hw(*video.shape[3:])
        check_image(image)
        check_image_batch(image.shape[0], clips)
        frame = resize_image(image, spec, resize, size)
        height, width = frame.shape[-2:]
        samples, mask = start_from(encode_images(vae, frame), clips, latent_frames, audio_latents)
        lines = [describe(latent_frames, height, width, audio_latents)]
        warnings = size_warnings(spec, height, width) + length_warnings(spec, latent_frames)
        return io.NodeOutput({"samples": samples, "noise_mask": mask, VARIANT_KEY: variant}, width, height,
                             images.to_image(frame).clamp(0.0, 1.0), float(FPS),
                             ui=report(cls, lines, warnings))


def example_sizes() -> str:
    """A sentence with what the first shape is in pixels for each area."""
    label = next(iter(ASPECTS))
    sizes = {variant.name.partition("_")[0]: size_for(label, variant) for variant in VARIANTS.values()}
    return f"{label} is {' and '.join(f'{size[1]}x{size[0]} at {area}' for area, size in reversed(sizes.items()))}."


def is_aspect(aspect: Any) -> bool:
    return aspect in (CUSTOM, CUSTOM_RATIO, *ASPECTS, *OLD_ASPECTS)


def unknown_aspect(aspect: Any) -> str:
    return f"Unknown aspect {shown(aspect)}: expected one of {', '.join(ASPECTS)}, {CUSTOM} or {CUSTOM_RATIO}."


def clip_size(spec: Variant, aspect: str, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((height, width) asked for, what becomes of it); ValueError for an unknown aspect or a hopeless shape."""
    if not is_aspect(aspect):
        raise ValueError(unknown_aspect(aspect))
    if aspect in ASPECTS:
        size = size_for(aspect, spec)
        return size, size
    if aspect in OLD_ASPECTS:
        return OLD_ASPECTS[aspect], size_for(aspect, spec)
    size = GEOMETRY.snap_hw(height, width, None if aspect == CUSTOM else spec.area)
    if aspect == CUSTOM_RATIO:
        check_shape("The ratio", (height, width), size, "Choose width and height nearer to each other")
    return (height, width), size


def choose_latent_frames(spec: Variant, seconds: float, frames: int) -> int:
    """Latent frames for the frames asked for, else the seconds, else (both 0) the variant's trained length."""
    if frames:
        return GEOMETRY.latent_frames_from_frames(GEOMETRY.snap_frames(frames))
    if seconds:
        return GEOMETRY.latent_frames_from_frames(GEOMETRY.frames_from_seconds(seconds))
    return spec.latent_frames


def empty_samples(latent_frames: int, height: int, width: int, batch_size: int) -> NestedTensor:
    """Zeros for a clip of height x width pixels, and for the sound that goes with it."""
    device = comfy.model_management.intermediate_device()
    video = torch.zeros(
        [batch_size, GEOMETRY.video.channels, latent_frames, *GEOMETRY.latent_hw(height, width)], device=device)
    audio = torch.zeros([batch_size, GEOMETRY.audio.channels, GEOMETRY.audio_latents_for(latent_frames)], device=device)
    return NestedTensor((video, audio))


def check_ranges(width: int, height: int, seconds: float, frames: int, batch_size: int) -> None:
    """ValueError for numbers that the node's widgets would not take; links and the API can bring any."""
    for name, value, least, most in (("width", width, 1, MAX_SIDE), ("height", height, 1, MAX_SIDE),
                                     ("batch_size", batch_size, 1, MAX_BATCH)):
        if not least <= value <= most:
            raise ValueError(f"{name} goes from {least} to {most}; got {value}, for a clip of {width}x{height}.")
    if seconds and not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"The length must be above 0 seconds and at most {MAX_SECONDS}, got {seconds}.")
    if frames and not 0 < frames <= MAX_FRAMES:
        raise ValueError(f"The number of frames must be above 0 and at most {MAX_FRAMES}, got {frames}.")


def check_shape(what: str, asked: tuple[int, int], size: tuple[int, int], advice: str) -> None:
    """ValueError if `size`, (height, width) in pixels made from `asked`, is hopelessly narrow."""
    if max(size) > MAX_RATIO * min(size):
        raise ValueError(f"{what} of {asked[1]}x{asked[0]} would become a clip of {size[1]}x{size[0]} pixels. Clips of "
                         f"more than {MAX_RATIO}:1 are refused; the reference recommends up to 2.5:1. {advice}.")


def check_amount(latent_frames: int, height: int, width: int, batch_size: int) -> None:
    """ValueError for a clip that is beyond any machine, before memory is taken for it."""
    tokens = batch_size * GEOMETRY.video_tokens(latent_frames, height, width)
    if tokens > MAX_TOKENS:
        raise ValueError(f"{batch_size} x {width}x{height} of {GEOMETRY.frames_from_latent(latent_frames)} frames are "
                         f"{tokens:,} tokens, but at most {MAX_TOKENS:,} are made. Lower size, length or batch_size.")


def step_memory(spec: Variant, latent_frames: int, height: int, width: int, batch_size: int) -> int:
    """Bytes that a step needs beside the model; of a clip that is longer than trained, for a window of that length."""
    return pass_memory(batch_size * GEOMETRY.video_tokens(min(latent_frames, spec.latent_frames), height, width))


def check_memory(memory: int, what: str) -> None:
    """ValueError for a clip that no GPU of today could sample."""
    if memory > MAX_PASS:
        raise ValueError(f"{what} would need about {human(memory)} of GPU memory in every step, beside the model; "
                         f"at most {human(MAX_PASS)} are allowed, which is all that an H200 has. Lower width and "
                         "height, or batch_size.")


def memory_warnings(memory: int) -> list[str]:
    """A sentence when a step needs more than the device has in all."""
    device = comfy.model_management.get_torch_device()
    there = comfy.model_management.get_total_memory(device)
    if memory <= there:
        return []
    return [f"A step needs about {human(memory)} beside the model, but this machine's {device.type.upper()} has "
            f"{human(there)}: lower width and height, seconds or batch_size."]


def check_image(image: torch.Tensor) -> None:
    """ValueError for a batch without images, an image without pixels, and pixels that are no numbers."""
    if image.numel() == 0:
        raise ValueError(f"The image is empty: its shape is {list(image.shape)}. Connect a picture of at least 1x1 "
                         "pixel, as 'Load Image' gives it.")
    if not bool(torch.isfinite(image).all()):
        raise ValueError("The image holds values that are not finite (NaN or infinity), which would spoil the whole "
                         "clip. Look at the nodes that made it; 'Load Image' gives values from 0 to 1.")


def check_image_batch(image_count: int, clips: int) -> None:
    """One image serves every clip of the batch; several must be one per clip, or ValueError."""
    if image_count not in (1, clips):
        raise ValueError(
            f"'Ovi First Frame' got {image_count} images for {clips} clip{'s' * (clips > 1)}: give one image, or set "
            f"batch_size of 'Ovi Empty Latent' to {image_count} for one clip per image.")


def resize_image(image: torch.Tensor, spec: Variant, resize: str, size: tuple[int, int] | None) -> torch.Tensor:
    """The image as a frame [B, 3, height, width] in -1..1; `size` is (height, width) for crop and stretch."""
    frame = images.to_frame(image.float())
    if resize == RESIZE_REFERENCE:
        height, width = frame.shape[-2:]
        target = GEOMETRY.image_target_hw(height, width, spec.area)
        check_shape("The image", (height, width), target,
                    "Crop the image, or use resize 'crop' with 'Ovi Empty Latent'")
        return images.resize_plain(frame, *target)
    if resize not in (RESIZE_CROP, RESIZE_STRETCH):
        raise ValueError(f"Unknown resize {resize!r}: expected {RESIZE_REFERENCE}, {RESIZE_CROP} or {RESIZE_STRETCH}.")
    if size is None:
        raise ValueError(f"Resize {resize!r} takes the size from the latent input, but none is connected. Connect "
                         f"'Ovi Empty Latent', or choose {RESIZE_REFERENCE!r}.")
    fit = images.center_crop if resize == RESIZE_CROP else images.stretch
    return fit(frame, *size)


def encode_images(vae, frame: torch.Tensor) -> torch.Tensor:
    """Frames [B, 3, H, W] in -1..1 -> latents [B, 48, 1, H/16, W/16] in the VAE's own range.

    One at a time: core's VAE takes a batch of images for the frames of one video. Core does not clamp, so bicubic
    overshoots reach the network as in the reference.
    """
    return torch.cat([vae.encode(image[None]) for image in images.to_image(frame)])


def start_from(first: torch.Tensor, clips: int, latent_frames: int, audio_latents: int):
    """(samples, noise mask), both nested: `first` [1 or B, 48, 1, H, W] kept in frame 0, all else to be sampled.

    The other frames hold the latent mean, which is what the model's normalisation takes to zero.
    """
    height, width = first.shape[-2:]
    mean = comfy.latent_formats.Wan22().process_out(first.new_zeros([1, GEOMETRY.video.channels, 1, 1, 1]))
    video = mean.repeat(clips, 1, latent_frames, height, width)
    video[:, :, :1] = first
    video_mask = first.new_ones([clips, 1, latent_frames, height, width])
    video_mask[:, :, :1] = 0.0
    audio = first.new_zeros([clips, GEOMETRY.audio.channels, audio_latents])
    audio_mask = first.new_ones([clips, 1, audio_latents])
    return NestedTensor((video, audio)), NestedTensor((video_mask, audio_mask))


def describe(latent_frames: int, height: int, width: int, audio_latents: int) -> str:
    """Two lines: the clip in pixels, frames and seconds, and what the model makes of it."""
    frames = GEOMETRY.frames_from_latent(latent_frames)
    tokens = GEOMETRY.video_tokens(latent_frames, height, width)
    return (
        f"{width}x{height}, {frames} frames at {FPS} per second = {GEOMETRY.video_seconds(latent_frames):.2f} s, "
        f"sound {GEOMETRY.audio_seconds(audio_latents):.2f} s\n"
        f"{latent_frames} video and {audio_latents} audio latents, {tokens + audio_latents:,} tokens"
    )


def size_notes(spec: Variant, aspect: str, asked: tuple[int, int], size: tuple[int, int]) -> list[str]:
    """What happened between the size asked for and the size made, (height, width); empty when they are equal."""
    if asked == size:
        return []
    note = f"{asked[1]}x{asked[0]} became {size[1]}x{size[0]}"
    if aspect == CUSTOM:
        return [f"{note}: sides are multiples of {MULTIPLE}."]
    return [f"{note}: the area of {spec.name}, in multiples of {MULTIPLE}."]


def size_warnings(spec: Variant, height: int, width: int) -> list[str]:
    """A sentence when the size is more than 10 % away from the area the variant was trained on."""
    if not area_is_off(height, width, spec.area):
        return []
    share = height * width / spec.area
    return [f"{width}x{height} is {share:.0%} of the area {spec.name} was trained on."]


def length_warnings(spec: Variant, latent_frames: int) -> list[str]:
    """A sentence when the clip has another length than the variant was trained on."""
    if latent_frames == spec.latent_frames:
        return []
    frames = GEOMETRY.frames_from_latent(latent_frames)
    return [f"{frames} frames: {spec.name} was trained on {spec.frames} only."]
