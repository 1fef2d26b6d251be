"""The bundled demonstration pair: a small target, its drafter, and a drafter of another family."""
