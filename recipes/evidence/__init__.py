"""Evidence: whether choosing beats chance, as grids of small runs on real text."""
