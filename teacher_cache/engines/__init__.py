"""Engines that run the prefixed teacher and return its signals."""
