"""The student: what it is, what of it is trained, and what a forward pass of it computes."""
