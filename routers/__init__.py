"""Routers: arithmetic on one rank's tokens; read `api.py` first."""
