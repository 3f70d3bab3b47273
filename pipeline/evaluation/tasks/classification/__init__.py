"""Zero-shot classification of images by prompts."""
