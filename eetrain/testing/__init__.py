"""Shipped helpers for tests: tiny models of every supported family, and functions run on several processes."""
