"""References in torch: what a fused MoE should compute, and how FlashInfer lays out its tensors."""
