"""A checkpoint for others to use: found by its address, verified, and written as a folder with a model card."""
