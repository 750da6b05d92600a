"""One LightningModule a training stage."""
