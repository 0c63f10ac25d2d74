"""The cache on disk: recipe, manifest, shards and what they hold."""
