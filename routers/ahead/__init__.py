"""Routers that decide for all layers before layer 0; read `plan.py`, then `pregate.py`."""
