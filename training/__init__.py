"""Data, the training loop and checkpoints; read `trainer.py` first."""
