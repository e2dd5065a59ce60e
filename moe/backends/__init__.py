"""Adapters of our parts to other systems; each imports its package where it is used."""
