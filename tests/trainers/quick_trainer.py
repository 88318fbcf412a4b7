"""A trainer that is done at once."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class QuickTrainer(nnUNetTrainer):
    def initialize(self):
        super().initialize()
        self.num_epochs = self.num_val_iterations_per_epoch = 1
        self.num_iterations_per_epoch = 2
