"""Training of the fused model: what is learnt, from which clips, and which weights."""
