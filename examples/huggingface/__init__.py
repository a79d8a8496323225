"""Training scripts for networks of Hugging Face's transformers, under Accelerate."""
