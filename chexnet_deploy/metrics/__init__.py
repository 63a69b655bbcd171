"""Statistics of scores against labels; they know nothing of models, sessions or files."""
