"""Turns dataset columns into gradients: windows, the training loop, evaluation, pictures."""

import datasets_scripts  # noqa: F401 - refuses an installation of the model alone
