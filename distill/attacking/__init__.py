"""Attacking: does a searched suffix or a soft prompt bring back what was forgotten?"""
