"""transformers' Trainer: its arguments and callbacks, and the held-out queries it asks."""
