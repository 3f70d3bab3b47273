"""Alignment of words and regions by attention, on ALIGN-BENCH."""
