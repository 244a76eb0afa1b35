"""Samepage: a shared notebook for a team, served as JSON-RPC 2.0 with a small web page."""
