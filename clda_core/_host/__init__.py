"""Everything that touches what is not ours: models, optimizers, processes, random state and torch itself."""
