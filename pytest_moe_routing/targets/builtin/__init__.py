"""The embedded target: a classifier and gates that are right for each FlashInfer release."""
