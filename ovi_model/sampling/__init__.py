"""Sampling of several streams at once, for any family: solvers, guidance, caching, attention backends."""
