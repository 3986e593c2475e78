"""GR-MG's policy checkpoints to ours and back. The model never imports it, and Hub exports leave it out."""
