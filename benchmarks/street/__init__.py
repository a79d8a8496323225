"""Street scenes: GTA to Cityscapes in small, from flat-shaded game frames to photo-like ones."""
