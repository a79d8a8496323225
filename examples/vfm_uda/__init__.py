"""CLDA inside VFM-UDA and VFM-UDA++, by configuration alone: see README.md in this folder.

A user copies this folder into the host. Its modules import each other relatively, and ``clda_core``; ``verify`` is run
by ``python -m clda_core.examples vfm-uda --verify``.
"""
