"""The trained digits model, and images to quantise it by and to judge it on."""

from typing import Any

from convmixer_fast.models.digits import digits_model, held_out_digits, training_digits

__all__ = ["calibrated_digits"]


def calibrated_digits() -> tuple[Any, ...]:
    """Return the model, images to calibrate with, held-out ones, and these prepared."""
    model, prepare = digits_model()

    def normalized(images):
        return (images - prepare.mean[0]) / prepare.std[0]

    held_out = held_out_digits()
    return model, normalized(training_digits().images[:256]), held_out, normalized(held_out.images)
