"""Weights: what a run starts from, adapters, the folder that it exports."""
