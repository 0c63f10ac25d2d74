"""Probing: does a model still hold inside what it no longer says?"""
