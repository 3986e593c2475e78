"""Goal images for control, from recordings or a diffusion model; knows nothing of policies or training."""

import datasets_scripts  # noqa: F401 - refuses an installation of the model alone
