"""The generator of the demo world: its facts, its query files and its model."""
