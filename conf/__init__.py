"""Configuration: schemas, YAML groups and their composition. Read `compose.py` first."""
