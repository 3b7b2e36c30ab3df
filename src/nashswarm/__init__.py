"""Nash-Swarm: mixed-precision quantization of causal language models, with every byte counted."""

__version__ = "0.1.0"
