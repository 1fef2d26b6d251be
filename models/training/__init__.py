"""Training of the bundled pair: tokenizers, data, PyTorch model, loop and probes."""
