"""What a trained model is used for: text, and norms folded into Linears."""
