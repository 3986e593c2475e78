"""Turns dataset columns into gradients: windows, the training loop, evaluation, pictures."""
