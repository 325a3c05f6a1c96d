"""Passes over a whole graph."""
