"""Trains the small hybrid of tests and demos: tests/models/tiny-hybrid."""
