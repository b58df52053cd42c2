"""The whole library in a few lines: build a ConvMixer, optimize it, compare.

Run it with ``python examples/optimize_model.py``.
"""

import torch

import convmixer_fast


def main() -> None:
    """Optimize an untrained ConvMixer-256/8 and print how far its logits are from the source's."""
    model = convmixer_fast.ConvMixer(256, 8, kernel_size=5, patch_size=2, num_classes=10).eval()
    fast = convmixer_fast.optimize(model)
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        difference = (fast(images) - model(images)).abs().max()
    print(fast)
    print(f"largest difference of logits: {difference:.1e}")


if __name__ == "__main__":
    main()
