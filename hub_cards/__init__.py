"""Model cards, written from the measurements of a run."""
