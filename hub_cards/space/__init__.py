"""The Space: a checkpoint's foresight over an episode, in the browser."""
