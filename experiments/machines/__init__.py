"""Machines that a replay stands in for: a link, and what computing takes beside it. One kind a file."""
