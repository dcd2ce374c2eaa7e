"""How many rows attention needs: by passage, step, layer and head, by bits of the index, by p."""
