"""Builds the Samepage appliance: recipes -> layout -> render -> layers -> release -> ISO, disk, bundle -> verified node."""

__version__ = "2026.11.0"
