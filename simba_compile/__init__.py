"""simba_compile: run pre-trained Mamba models on the tokens that matter, as a ``torch.compile`` backend.

``torch.compile(model, backend="simba", options={"keep": 0.1})`` needs no import of this package. What it offers besides:
`Options` (what the backend takes) and `explain` (what it does to a model).
"""

from typing import TYPE_CHECKING, Any

from simba_compile.options import Options

if TYPE_CHECKING:
    from simba_compile.report import Report, explain

__all__ = ["Options", "Report", "explain"]


def __getattr__(name: str) -> Any:
    """Load what needs torch when it is first asked for: ``simba --help`` does not."""
    if name in ("Report", "explain"):
        from simba_compile import report

        return getattr(report, name)
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("simba_compile")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what is loaded late, too."""
    return sorted({*globals(), *__all__, "__version__"})
