"""What ``verify`` is made of: data, configs, the host's process, the runs, and the checks on them."""
