"""Fast ConvMixer inference: the same model, the same outputs, fused kernels."""
