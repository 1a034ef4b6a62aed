"""Odd and damaged input, made at random, each with what a reader has to do with it: `python -m tests.fuzz`."""
