"""FlashInfer itself as a target."""
