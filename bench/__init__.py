"""Benchmarks: each file answers one question, prints tables and writes them to bench/results."""
