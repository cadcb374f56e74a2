"""Generated examples are the same in every run, so that a change, not chance, makes a test fail."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
