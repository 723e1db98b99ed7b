"""Publish token stores at a URL, and read published stores through a local cache."""
