"""A function as a module."""

from torch import nn


class Lambda(nn.Module):
    """Calls a function with its inputs and then its children."""

    def __init__(self, function, *children):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(children)

    def forward(self, *x):
        return self.function(*x, *self.parts)
