"""The comparison of the layers of the zoo."""
