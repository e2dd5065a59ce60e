"""Commands: the console script, starting ranks, run folders. Read `cli.py` first."""
