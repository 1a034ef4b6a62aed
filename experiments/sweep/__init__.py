"""A study's cells (a variant with one seed): trained and judged side by side, gathered into one table."""
