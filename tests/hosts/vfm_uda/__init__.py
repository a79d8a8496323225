"""What ``examples.vfm_uda.verify`` is made of: data, the host's process, and the checks on its runs."""
