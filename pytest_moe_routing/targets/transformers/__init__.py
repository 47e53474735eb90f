"""transformers, whose MoE blocks route in torch: no fused kernel, and so no verdicts."""
