"""Measuring decompositions: what ``clipfast bench`` does, and what the files in ``benchmarks/`` share with it.

Data flows one way: **plan → cases → gate → pairs → document → table, chart, comparison**.
"""
