"""The tests; a package, so that a file of one directory may import the truths of another."""
