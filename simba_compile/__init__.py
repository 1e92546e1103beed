"""simba_compile: run pre-trained Mamba models on the tokens that matter, as a ``torch.compile`` backend.

``torch.compile(model, backend="simba", options={"keep": 0.1})`` needs no import of this package. What it offers besides:
`Options` (what the backend takes) and `explain` (what it does to a model).
"""

from simba_compile.options import Options
from simba_compile.report import Report, explain

__all__ = ["Options", "Report", "explain"]
