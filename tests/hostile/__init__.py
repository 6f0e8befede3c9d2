"""A corpus of hostile and odd input: each case is a few lines of data in a YAML file, and one test runs them all.

`contents.py` makes the files that a case asks for, `case.py` reads cases and makes their folders, `test_corpus.py` runs them.
"""
