"""Adapters and runnable jobs that use clda_core; the package itself never imports them."""
