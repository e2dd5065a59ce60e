"""Plans of stages and the executor that runs them; read `plan.py` first."""
