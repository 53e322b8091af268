"""Definitions of the networks in torch: what is trained, and what the graphs are exported from."""
