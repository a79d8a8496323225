"""The tests; a package, so that no other `tests` of an environment comes before it for `examples.daformer.verify`."""
