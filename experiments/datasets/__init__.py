"""Data sets that studies and recipes read, made from what registries serve."""
