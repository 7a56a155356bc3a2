"""Faults on purpose, row by row of the table in docs/faults.md; each row is a function that takes a number of cases."""
