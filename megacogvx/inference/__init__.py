"""How a model is used: a checkpoint to models on this layout, a prompt to a video, a video to files."""
