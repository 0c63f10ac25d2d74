"""Relearning: does what was forgotten come back when a model is fine-tuned again?"""
