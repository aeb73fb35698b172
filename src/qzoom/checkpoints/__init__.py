"""Checkpoints on disk and on the hub: the embedded model, our adapter, the authors' merged format, plain bases."""
