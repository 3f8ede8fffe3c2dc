"""Certificates that are made in several threads at once."""

import threading

import torch
import torch.nn.functional as F
from torch import nn

from orthonet import functional
from orthonet.certify import certify


class Network(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(functional.max_min(F.relu(self.first(x)), 1))


def test_threads_find_what_one_after_the_other_finds():
    models, x = [Network(seed).eval() for seed in range(3)], torch.ones(1, 4)
    found: list = [None] * len(models)

    def run(place):
        found[place] = certify(models[place], x, lower=False)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, certificate in zip(models, found, strict=True):
        alone = certify(model, x, lower=False)
        assert certificate.constant == alone.constant
        assert [row.method for row in certificate.rows] == [row.method for row in alone.rows]
