"""Routes behind our widgets and pages; they run in ComfyUI's own server."""
