"""The API's methods, one module per group. Importing this package fills api.METHODS."""

from . import activities, bootstrap, comments, items, members, session, settings, stats

__all__ = ["activities", "bootstrap", "comments", "items", "members", "session", "settings", "stats"]
