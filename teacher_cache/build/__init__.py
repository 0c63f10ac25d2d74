"""Building a cache: plan the shards, run the teacher, write, finish."""
