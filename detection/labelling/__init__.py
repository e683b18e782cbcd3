"""Labels made with little work: a symbol found from an example."""
