"""Converting Ovi checkpoints between layouts and precisions, a layer at a time. Import the pack first."""
