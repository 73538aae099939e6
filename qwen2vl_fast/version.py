"""The one place of the version: pyproject.toml, the package and its documents read it here."""

__version__ = "0.1.0"
