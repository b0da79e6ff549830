"""Hydra plugin of apportion: see ``searchpath``."""
