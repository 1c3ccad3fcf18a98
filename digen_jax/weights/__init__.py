"""Checkpoints in diffusers' layout: reading, writing, checking."""
