"""The flow of a pass: reader → decoder → batches → decomposer → writer, each an object with one verb."""
