"""CLDA inside MIC classification (CDAN + MCC + SDAT + MIC), whose script runs unmodified."""
