"""Does CLDA make both models better, and which defaults follow from it?

``python -m benchmarks.evidence digits --seeds 20-29`` trains and appends records, and ``python -m benchmarks.evidence
report`` makes both pages of the evidence from the records alone.
"""
