"""EMORL (arXiv 2505.02579): one LoRA adapter per objective, fine-tuned with RL, then fused."""
