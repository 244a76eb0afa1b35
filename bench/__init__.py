"""Measures the builder and the appliance beside the plain Debian way. Nothing here is a test: it only reports."""
