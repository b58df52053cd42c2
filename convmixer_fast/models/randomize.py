"""Random weights that a whole network can be tested and timed with."""

import torch
from torch import Tensor, nn

__all__ = ["randomize"]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give ``model`` weights and BatchNorm statistics through which images still matter.

    PyTorch's own initialisation lets the signal fade over a few dozen layers, so that the
    outputs hardly depend on the image, and its BatchNorms compute the identity: both would
    hide mistakes. Here convolutions are drawn as by He et al. (arXiv 1502.01852), and every
    BatchNorm gets statistics, scales of both signs and shifts.

    Args:
        model: is changed in place; parametrised weights are left as they are.
        seed: of the random numbers; PyTorch's global generator is not used.

    Returns:
        ``model``, in eval mode. Its attribute ``random_weights`` says so to what is made of it.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and "weight" in module._parameters:
                weight = torch.empty(module.weight.shape)
                nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
                module.weight.copy_(weight)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                fill(module.running_mean, -0.5, 0.5)
                fill(module.running_var, 1, 4)
                fill(module.weight, 0.5, 1.5)
                fill(module.bias, -0.5, 0.5)
                if module.weight is not None:
                    module.weight[::5].neg_()
    model.random_weights = True  # type: ignore[assignment]
    return model.eval()
