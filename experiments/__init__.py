"""Experiments on networks beside an exact truth, and the published ones: ``dfmath reproduce``."""
