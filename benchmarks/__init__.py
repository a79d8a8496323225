"""Evidence of what CLDA gains, and what it costs; not part of the installed package."""
