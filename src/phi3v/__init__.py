"""phi3v: fine-tune Phi-3.5-vision."""
