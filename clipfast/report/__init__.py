"""Figures and numbers for people: what the terms of an embedding say about texts, as tables and pictures."""
