"""Goal images for control, from recordings or a diffusion model; knows nothing of policies or training."""
