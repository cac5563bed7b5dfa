"""Uses of a trained model: generating text, and folding norms into Linears."""
