"""Measurements of torchft beside another implementation of the same API. See README.md."""
