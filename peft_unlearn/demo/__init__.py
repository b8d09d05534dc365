"""The embedded models and the one-command story."""
