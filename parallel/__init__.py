"""Bytes between ranks, and the order of stages; knows no experts. Read `dims.py` first."""
