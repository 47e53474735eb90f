"""FlashInfer's entry points in torch: memory layouts, arithmetic and injectable faults."""
