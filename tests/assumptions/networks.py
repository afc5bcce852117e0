"""Small networks."""

import torch
from torch import Tensor, nn


def scorer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    features = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


class Ordered(nn.Module):
    """Patches as tokens, in an order that is a choice, with a number of others after them."""

    def __init__(self, order: Tensor | None = None, after: int = 0, amid: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.norm, self.head = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.Linear(6, 3)
        self.order, self.after, self.amid = order, after, amid

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.cut(x).flatten(2).mT
        tokens = tokens if self.order is None else tokens[:, self.order]
        tokens = torch.cat([tokens, tokens.new_ones(len(x), self.after, 6)], dim=1)
        if self.amid:
            tokens = torch.cat([tokens[:, : self.amid], tokens.new_ones(len(x), 1, 6), tokens[:, self.amid :]], dim=1)
        return self.head(self.norm(tokens).tanh().mean(1))
