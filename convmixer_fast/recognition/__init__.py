"""Any ``nn.Module`` -> :class:`spec.ConvMixerSpec`, or the first place where it differs."""
