"""Characters: a Lipschitz transformer next to a plain one, on text that Python ships."""

__all__: list[str] = []
