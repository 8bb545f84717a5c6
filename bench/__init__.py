"""Benchmarks: ``python -m bench`` measures ratios against peers and limits in one run, and writes them down."""
