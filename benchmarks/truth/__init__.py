"""The paper's experiments with known ground truth: the bundled model on scenes that it was not trained on."""
