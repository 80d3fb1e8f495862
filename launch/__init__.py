"""Starting a recipe somewhere."""
