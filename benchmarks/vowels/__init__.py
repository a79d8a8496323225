"""Vowels: spectra of men in a quiet room, to those of women in a noisy one. Nothing of CLDA is tuned on it."""
