"""A run for others: weights in the formats of other libraries, ONNX, a model card."""
