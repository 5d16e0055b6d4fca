"""The Ovi family: its network, its checkpoints, its prompts and latents."""
