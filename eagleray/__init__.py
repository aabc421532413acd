"""eagleray: disaggregated serving of large language models on Ray.

The packages lie at the repository root (``router/``, ``kernels/``, ...) and are imported under this one prefix.
Public names are resolved on first use, so that ``import eagleray.router`` needs neither torch nor ray.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from eagleray.core.sampling_params import SamplingParams as SamplingParams
    from eagleray.engine.llm import LLM as LLM
    from eagleray.engine.request_output import CompletionOutput as CompletionOutput
    from eagleray.engine.request_output import RequestOutput as RequestOutput

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kv_transfer" / "__init__.py").is_file():
    __path__.append(str(_root))  # a source tree that is not installed: the packages lie beside this one

_PUBLIC: Final = {
    "LLM": "eagleray.engine.llm",
    "CompletionOutput": "eagleray.engine.request_output",
    "RequestOutput": "eagleray.engine.request_output",
    "SamplingParams": "eagleray.core.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(_import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'eagleray' has no attribute {name!r}")
