"""English prose that a Python installation carries, found without importing what is installed.

Imports the standard library alone: the workers that read files start in no time.
"""
