"""Train the digits model of the demo: a small ConvMixer on scikit-learn's handwritten digits.

    python examples/train_digits.py --output digits.safetensors

The digits are real scans, 8 x 8 pixels each. The same command on the same machine
writes the same bytes. ``--validate`` is for choosing hyperparameters: it trains on
four fifths of the training images and reports the accuracy on the others, so that
the held-out images are used once, for the number that the last line states.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save as serialize
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from convmixer_fast import ConvMixer
from convmixer_fast.models.digits import Digits, held_out_digits, split_digits, training_digits

DIM, DEPTH, KERNEL_SIZE, PATCH_SIZE = 64, 4, 5, 1
EPOCHS, BATCH_SIZE, PEAK_LR, WEIGHT_DECAY, LABEL_SMOOTHING = 40, 64, 0.01, 0.05, 0.1
MAX_SHIFT, MAX_TURN, MAX_STRETCH = 1.0, 0.15, 0.1
SEED = 0
# Sums are split between threads, so their number changes the rounding; a model as small as
# this gains nothing from a second one.
THREADS = 1


def main(
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")] = Path(
        "digits.safetensors"
    ),
    validate: Annotated[
        bool, typer.Option(help="Report validation accuracy instead; write nothing.")
    ] = False,
) -> None:
    """Train the digits model of the demo and write it as safetensors."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    console = Console()
    digits = training_digits()
    if validate:
        digits, unseen = split_digits(digits, held_out_share=0.2)
    mean = round(float(digits.images.mean()), 4)
    std = round(float(digits.images.std()), 4)

    model = train(Digits((digits.images - mean) / std, digits.labels), blank=-mean / std)
    if validate:
        console.print(f"validation accuracy {accuracy(model, unseen, mean, std):.2%}")
        return
    save(model, output, mean, std, trained_on=len(digits.labels))
    unseen = held_out_digits()
    console.print(
        f"held-out accuracy {accuracy(model, unseen, mean, std):.2%} on {len(unseen.labels)} "
        f"images; wrote {output} ({output.stat().st_size / 1000:.0f} kB)"
    )


def train(digits: Digits, blank: float) -> ConvMixer:
    """Train a ConvMixer on normalised images; ``blank`` is the value of an empty pixel there."""
    generator = torch.Generator().manual_seed(SEED)
    model = ConvMixer(
        DIM, DEPTH, kernel_size=KERNEL_SIZE, patch_size=PATCH_SIZE, in_chans=1, num_classes=10
    )
    # Gives the same weights up to rounding, several times faster on a CPU.
    convert_conv2d_weight_memory_format(model, torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    # The images that do not fill a batch wait for the next epoch's order.
    batches = len(digits.labels) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, EPOCHS * batches)
    model.train()
    for _ in track(range(EPOCHS), description="training"):
        order = torch.randperm(len(digits.labels), generator=generator)
        for rows in order[: batches * BATCH_SIZE].split(BATCH_SIZE):
            images = jitter(digits.images[rows] - blank, generator) + blank
            loss = F.cross_entropy(
                model(images), digits.labels[rows], label_smoothing=LABEL_SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return model


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, turn and stretch each of ``images`` (N, 1, H, W) a little; 0 comes in from outside."""
    count, side = images.shape[0], images.shape[-1]

    def uniform(limit: float, *shape: int) -> Tensor:
        return (2 * torch.rand(count, *shape, generator=generator) - 1) * limit

    angle, stretch = uniform(MAX_TURN), 1 + uniform(MAX_STRETCH, 2)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack((cos, -sin, sin, cos), dim=1).view(count, 2, 2)
    # affine_grid counts in half images.
    shift = uniform(MAX_SHIFT, 2) * 2 / side
    theta = torch.cat((turn * stretch[:, :, None], shift[:, :, None]), dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def accuracy(model: ConvMixer, digits: Digits, mean: float, std: float) -> float:
    """Return the share of ``digits`` that ``model`` classifies correctly."""
    with torch.inference_mode():
        return digits.accuracy(model((digits.images - mean) / std))


def save(model: ConvMixer, output: Path, mean: float, std: float, trained_on: int) -> None:
    """Write the weights, and in the file's metadata how to use them."""
    # The batch counters are of no use to a trained model, and integers.
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if v.is_floating_point()}
    # Metadata of safetensors are strings: here every value but the plain words of
    # "activation" and "training" is JSON: a number, a list of one number a channel (mean
    # and std, of pixels in [0, 1], ink being 1), or the list of the classes' names.
    metadata = {
        "activation": "gelu",
        "image_size": json.dumps(8),
        "crop_pct": json.dumps(1.0),
        "mean": json.dumps([mean]),
        "std": json.dumps([std]),
        "labels": json.dumps([str(digit) for digit in range(10)]),
        "training": (
            f"examples/train_digits.py on {trained_on} images of sklearn.datasets.load_digits: "
            f"{EPOCHS} epochs, batch {BATCH_SIZE}, AdamW, one-cycle learning rate to {PEAK_LR}, "
            f"weight decay {WEIGHT_DECAY}, label smoothing {LABEL_SMOOTHING}, shifts up to "
            f"{MAX_SHIFT} pixel, turns up to {MAX_TURN} rad, stretches up to {MAX_STRETCH:.0%}, "
            f"seed {SEED}"
        ),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(with_sorted_header(serialize(tensors, metadata)))


def with_sorted_header(file: bytes) -> bytes:
    """Return the safetensors ``file`` with its header's keys, which come in any order, sorted."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[end:]


if __name__ == "__main__":
    typer.run(main)
