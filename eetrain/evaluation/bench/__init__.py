"""Decoding speed: policies against transformers, interleaved in one process."""
