"""Latency targets: measure a table, search by it, check the result."""
