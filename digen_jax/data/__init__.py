"""Prompt sets, tokenizers and the procedural scenes of the embedded task."""
