"""The student: batches, losses, trainer, evaluation."""
