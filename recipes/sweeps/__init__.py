"""Runs as jobs of a sweep: their identity, their folders, and what the processes of one have to agree on."""
