"""Meshes, sharding rules and resharding. Knows nothing about RL."""
