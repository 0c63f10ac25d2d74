"""Noise on the student before training, so that what was forgotten is harder to learn again.

A student that only learned to decline still holds the answers, and a few steps of fine-tuning bring
them back. UNDO (arXiv 2506.06278) damages the weights first and rebuilds by distillation what is to
stay: the more noise, the less is left to recover, and the more queries and steps the rebuilding
takes. docs/method.md has the curve.
"""

import hashlib

import torch
from torch import nn


def perturb(model: nn.Module, *, alpha: float, beta: float, seed: int) -> None:
    """Shrink every trained weight and add noise: `theta <- (1 - alpha) theta + alpha beta N`.

    N is Xavier-uniform for matrices and zero for vectors, so norms and biases only shrink (UNDO,
    arXiv 2506.06278). Frozen parameters stay, and a tied matrix is changed once. The draw depends
    on the seed and the parameter's name alone: it is the same on every device and process.

    Args:
        model: Changed in place, whole (not yet sharded).
        alpha: How much of the weights is given up, 0 to 1; 0 changes nothing.
        beta: Scale of the noise, 0 or more.
        seed: Of the draw.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.mul_(1.0 - alpha)
            if parameter.ndim > 1:
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                drawn = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                noise = torch.empty(parameter.shape)
                # Experts are many matrices in one tensor, which is no kernel of a convolution.
                apart = parameter.ndim == 3 and "experts" in name
                for matrix in noise if apart else (noise,):
                    nn.init.xavier_uniform_(matrix, generator=drawn)
                parameter.add_(noise.to(parameter), alpha=alpha * beta)
