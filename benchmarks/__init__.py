"""Benchmarks: one file per question; correctness is checked before anything is timed. See README.md."""
