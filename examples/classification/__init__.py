"""CLDA on image classification: the digits job and its parts."""
