"""Routing that others have published, read as traces of this project. One format a file."""
