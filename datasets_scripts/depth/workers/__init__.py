"""Depth models in a Python environment of their own; `serving.py` has the protocol."""
