"""A trainer that is done at once."""

from __future__ import annotations

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class QuickTrainer(nnUNetTrainer):
    def initialize(self):
        super().initialize()
        self.num_epochs = self.num_val_iterations_per_epoch = 1
        self.num_iterations_per_epoch = 2

    def configure_optimizers(self):
        # the scheduler of nnU-Net 2.5 knows older versions of torch only
        optimizer = torch.optim.SGD(self.network.parameters(), self.initial_lr)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)
