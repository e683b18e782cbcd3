"""The network that is pretrained: a timm backbone, and the projector whose output goes into the loss."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.backbone import Normalise
from pretraining.dense import DenseHead


def build_projector(widths: list[int], last_norm: bool) -> nn.Sequential:
    """A multilayer perceptron of `widths` (input first); BatchNorm and ReLU follow each layer but the last.

    The last layer has no bias. With `last_norm` a BatchNorm follows it, as in SimCLR's projector; VICReg's
    expander has none. Widths [2048, 8192, 8192, 8192] are VICReg's (arXiv 2105.04906, section 4.2), and
    [2048, 2048, 128] are SimCLR's.
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[:-1]):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1]))
    return nn.Sequential(*layers)


def keep_statistics(backbone: nn.Module) -> None:
    """Have the BatchNorm layers use the mean and variance that they hold, in training too, and keep them.

    Their weights and biases are trained. The mode is set before each forward pass, since `train()` of any
    module around them would undo it.
    """
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_evaluate)


def _evaluate(module: nn.Module, _: object) -> None:
    module.training = False


class Encoder(nn.Module):
    """Backbone and projector. One call takes both views, since DDP expects one forward call in each step.

    Args:
        normalise: turns pixels into the input of the backbone, by the mean and std of the pool.
        joint: True passes both views through the network as one batch of 2n, as SimCLR does. False makes two
            passes, so that BatchNorm's statistics belong to one view, as VICReg does.
        dense: reads a map of the backbone for the dense term; None without that term.
    """

    backbone: Any

    def __init__(
        self,
        normalise: Normalise,
        backbone: nn.Module,
        projector: nn.Module,
        joint: bool,
        dense: DenseHead | None = None,
    ):
        super().__init__()
        self.normalise = normalise
        self.backbone = backbone
        self.projector = projector
        self.joint = joint
        self.dense = dense

    def forward(self, view1: Tensor, view2: Tensor, *across: Tensor) -> tuple[Tensor, ...]:
        """view1, view2 uint8 [n, C, S, S], gray with C = 1 or RGB with 3 -> z1, z2 [n, D].

        With `dense` it takes their `schematics.places.across` [n, 2, 3] too, and gives a, b [n, K, D'] too.
        """
        if self.joint:
            halves = (part.chunk(2) for part in self.embed(torch.cat([view1, view2])))
            (z1, *maps1), (z2, *maps2) = zip(*halves, strict=True)
        else:
            (z1, *maps1), (z2, *maps2) = self.embed(view1), self.embed(view2)
        return (z1, z2, *(self.dense(*maps1, *maps2, *across) if self.dense else ()))

    def embed(self, views: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of views uint8 [n, C, S, S]: [n, D], and with `dense` the map that it reads."""
        pixels = self.normalise(views)
        if self.dense is None:
            return (self.projector(self.backbone(pixels)),)
        last, (local,) = self.backbone.forward_intermediates(pixels, indices=[self.dense.stage])
        return self.projector(self.backbone.forward_head(last)), local
