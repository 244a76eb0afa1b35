"""Builds the Samepage appliance: recipes -> layout -> render -> layers -> release -> ISO, disk or bundle -> node."""

__version__ = "2026.11.0"
