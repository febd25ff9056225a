"""posttrain teaches language models after pretraining: SFT, evaluation, reinforcement learning."""

__version__ = "0.1.0"
