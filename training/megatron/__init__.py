"""Megatron-core's distributed checkpoints, in and out."""
