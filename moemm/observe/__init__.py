"""What one sees of a run: terminal, metrics.jsonl, TensorBoard, tables, and `doctor`."""
