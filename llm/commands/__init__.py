"""The commands of ``llmrt``, one module each. They import torch models and transformers only when they run."""
