"""Does it work with ...? One table of layers, one function a column, and the page made of them."""
