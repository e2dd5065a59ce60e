"""Kernels of the MoE layer: permutation and grouped feed-forward, pure functions."""
