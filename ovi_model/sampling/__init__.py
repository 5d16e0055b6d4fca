"""Sampling of several streams at once, for any family of models."""
