"""What a trained model looks at, and how its parts compare."""
