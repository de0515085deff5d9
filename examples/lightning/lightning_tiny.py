"""A Lightning module as a workload: Lightning trains and saves as ever; Relight stops it, and keeps its saves."""

from pathlib import Path

import lightning
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from relight import LoopControl, LoopWorkload


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int = 16


class Module(lightning.LightningModule):
    def __init__(self, width: int, learning_rate: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 1))
        self.learning_rate = learning_rate

    def training_step(self, batch, batch_index):
        x, y = batch
        loss = (self.net(x) - y).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Lightning(LoopWorkload[Config]):
    """A small regression, trained by lightning.Trainer."""

    Config = Config

    def run(self, ctl: LoopControl) -> nn.Module:
        knobs = ctl.execution
        lightning.seed_everything(knobs.seed)
        x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        data = torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True).sin())
        module = Module(self.config.width, knobs.learning_rate)
        trainer = lightning.Trainer(
            accelerator=self.env.device.type,
            devices=1,
            max_epochs=knobs.max_epochs,
            max_steps=knobs.max_steps or -1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Relight(ctl)],
        )
        restored = ctl.restored()
        trainer.fit(
            module,
            torch.utils.data.DataLoader(data, batch_size=knobs.batch_size, shuffle=True),
            ckpt_path=restored / "last.ckpt" if restored else None,
            weights_only=False,  # it is our own: verified before it is given
        )
        return module


class Relight(lightning.Callback):
    def __init__(self, ctl: LoopControl) -> None:
        self.ctl = ctl

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        step = trainer.global_step
        self.ctl.report(step - 1, **{name: float(value) for name, value in trainer.callback_metrics.items()})
        trainer.should_stop = trainer.should_stop or self.ctl.should_stop()
        if trainer.should_stop or step % 10 == 0:
            self.ctl.save(step, lambda directory: _save(trainer, directory), epoch=trainer.current_epoch)


def _save(trainer: lightning.Trainer, directory: Path) -> None:
    trainer.save_checkpoint(directory / "last.ckpt")
