"""Model folders: what is in them, their fingerprints, loading them, LoRA adapters."""
