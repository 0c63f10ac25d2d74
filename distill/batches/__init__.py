"""From the rows of a cache to padded batches: views, order of draws, sequences."""
