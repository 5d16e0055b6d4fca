"""What is seen and heard: VAEs, first frames, mp4."""
