"""Benchmarks: ``rse-fast bench`` measures rse-fast beside its peers and limits in one run, and writes down what it saw.

Installed as `rse_fast.bench`; in a checkout also `bench`, so modules here import each other relatively. One suite is one module with
``run() -> (rows, targets)`` or, in pieces that can be run one at a time, ``cases() -> {name: function giving (rows, targets)}``.
"""
