"""Export of a run: weights in the formats of other libraries, ONNX, a model card."""
