"""Letters: clean type in some fonts, to worn type in others, by vision transformers. Nothing is tuned on it."""
