"""Benchmarks: one file per question, each behind a gate of correctness. See README.md."""
