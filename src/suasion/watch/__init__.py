"""Faults that ruin runs without a word: checks before a run, health signals during it.

`subject.py` says what is looked at, `policy.py`, `update.py` and `judge.py` are the checks,
`suite.py` runs them by name, `signals.py` watches the statistics of a running policy stage.
"""
