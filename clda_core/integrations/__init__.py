"""The learner in a training engine; each module imports its engine, and nothing else here imports the module."""
