"""Visual question answering on VQAv2."""
