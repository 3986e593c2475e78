"""Model cards, written from the measurements of a run."""

import datasets_scripts  # noqa: F401 - refuses an installation of the model alone
