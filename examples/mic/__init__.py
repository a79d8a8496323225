"""CLDA inside the MIC repository: segmentation and classification."""
