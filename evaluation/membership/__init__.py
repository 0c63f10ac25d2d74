"""Membership: does a model tell the forgotten texts from texts of their kind that it never saw?"""
