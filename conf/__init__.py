"""Hydra configs: ``slots/`` for every app, the rest for ``apportion-train``."""
