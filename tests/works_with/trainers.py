"""More columns: the training loops of other libraries, with no special code."""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor

from tests.works_with.columns import HOLDS, column, evaluated, train
from tests.works_with.rows import Row, excess

__all__ = ["accelerate", "lightning"]


def loader(row: Row) -> Any:
    data = torch.utils.data.TensorDataset(row.input(12))
    return torch.utils.data.DataLoader(data, batch_size=4)


@column("Lightning's `Trainer`", slow=True)
def lightning(row: Row) -> None:
    """Two epochs of `fit` with clipped gradients; the checkpoint it wrote gives the same bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning about loaders, loggers and processors
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        import lightning.pytorch as pl

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = row.make()

            def training_step(self, batch: Any, _: int) -> Tensor:
                return (self.layer(batch[0]) - 1.0).square().mean()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), 0.02)

        with tempfile.TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=2,
                logger=False,
                default_root_dir=folder,
                gradient_clip_val=1.0,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            module = Module()
            before = evaluated(module.layer, row.input())
            trainer.fit(module.train(), loader(row))
            path = trainer.checkpoint_callback.best_model_path
            loaded = Module.load_from_checkpoint(path, weights_only=True)
    after = evaluated(module.layer, row.input())
    assert trainer.global_step == 6 and not torch.equal(before, after)
    assert excess(row, module.layer) <= HOLDS
    assert torch.equal(evaluated(loaded.layer, row.input()), after)


@column("Accelerate", slow=True)
def accelerate(row: Row) -> None:
    """Prepared, trained in steps of two batches and clipped; `save_state` gives the same bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Accelerate about the machine
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        layer = row.make()
        before = evaluated(layer, row.input())
        step = torch.optim.AdamW(layer.parameters(), 0.02)
        model, step, data = accelerator.prepare(layer.train(), step, loader(row))
        for (x,) in data:
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - 1.0).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                step.step()
                step.zero_grad()
        layer = accelerator.unwrap_model(model)
        after = evaluated(layer, row.input())
        assert not torch.equal(before, after)
        assert excess(row, layer) <= HOLDS
        with tempfile.TemporaryDirectory() as folder:
            accelerator.save_state(folder)
            train(layer, row)
            assert not torch.equal(evaluated(layer, row.input()), after)
            accelerator.load_state(folder)
    assert torch.equal(evaluated(layer, row.input()), after)
