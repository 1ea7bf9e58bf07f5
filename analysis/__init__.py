"""Scaling-law analysis of any table of runs; docs/scaling-laws.md says how to use it. Never imports jax or lmjax."""
