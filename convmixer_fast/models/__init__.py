"""ConvMixers in plain PyTorch, their weights on disk and the images that they take."""
