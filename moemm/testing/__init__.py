"""Helpers for tests, shipped so that code built on moemm can use them. Nothing in moemm imports them."""
