"""What is no part of ConvMixer: options, progress, silence and needs of optional libraries."""
