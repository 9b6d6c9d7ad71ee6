"""nn.Modules over the operators."""
