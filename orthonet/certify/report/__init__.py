"""What is shown of a certificate and of a model: tables, figures, pages."""

__all__: list[str] = []
