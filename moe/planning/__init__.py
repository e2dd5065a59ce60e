"""Planning and predicting MoE training steps; read `shapes.py`, `block.py`, `policies.py`."""
