"""Caches that lie elsewhere: push, pull, list and read from a URL."""
