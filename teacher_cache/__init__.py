"""The teacher cache: its format, the engines that fill it, and the reader that streams it."""
