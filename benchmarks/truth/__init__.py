"""The paper's experiments where the truth is known: on the bundled model and scenes that it has not been trained on."""
