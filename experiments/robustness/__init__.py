"""What damaged files and ended processes do: nothing is lost, and nothing wrong is said in silence."""
