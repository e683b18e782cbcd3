"""How labels are made and mended: a symbol from an example, which labels are doubtful."""
