"""Classifiers by name, with their preprocessing."""
