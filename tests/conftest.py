"""Load one Hypothesis profile for all tests: no deadlines, for they measure the machine and not the code."""

from hypothesis import settings

settings.register_profile("house", deadline=None)
settings.load_profile("house")
