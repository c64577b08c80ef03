"""Exchange with other tools: bags from the files of CLAM, TRIDENT and torchmil, and the other way round."""
