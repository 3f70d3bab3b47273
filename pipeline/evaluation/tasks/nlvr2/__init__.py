"""NLVR2: sentences that are true or false of a pair of images."""
