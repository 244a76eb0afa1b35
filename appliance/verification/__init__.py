"""Proves a running node: the pytest plugin that runs the recipes' checks on it, and the reports."""
