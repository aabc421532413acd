"""What the endpoints share, passed in once by ``create_app``."""

from __future__ import annotations

from dataclasses import dataclass

from eagleray.core.clock import Clock
from eagleray.core.errors import InvalidRequest
from eagleray.router.service import GenerationService
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ApiSettings:
    """The front's own settings."""

    model: str  # the name that requests give
    max_body_bytes: int
    created_s: int  # Unix time of the start, for the model list
    api_key: str | None = None  # None: no key is asked for


@dataclass(frozen=True)
class ApiContext:
    """Everything an endpoint works with."""

    service: GenerationService
    tokenizer: Tokenizer
    template: ChatTemplate
    settings: ApiSettings
    clock: Clock

    def check_model(self, model: str) -> None:
        """Raises ``InvalidRequest`` (404) for a model that is not served, naming the one that is."""
        if model != self.settings.model:
            message = f"The model {model!r} does not exist; this server has {self.settings.model!r}."
            raise InvalidRequest(message, param="model", code="model_not_found", status=404)
