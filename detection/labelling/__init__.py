"""How labels are made and mended: which ones are doubtful, and where to look at them."""
