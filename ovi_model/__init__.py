"""Ovi inside ComfyUI: the fused audio-video model and everything that does not depend on the node surface."""
