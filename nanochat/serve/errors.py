"""Faults as clients see them: any exception becomes an error response in OpenAI's format, here and nowhere else.

Code that serves a request raises `ApiError`, or `UserError` for a value that the library refuses. `as_api_error` turns
these, FastAPI's own exceptions and everything unexpected into the `ApiError` whose body is sent.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nanochat.common import UserError

CLIENT_GONE = 499  # status in log and metrics when a client left before its answer began (nginx uses the same number)
ROLES = ("system", "developer", "user", "assistant")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_HTTP_MESSAGES = {
    400: "the request body is not JSON in UTF-8",
    404: "no such path; the API is under /v1",
    405: "this path does not support this method",
}


class ApiError(Exception):
    """Ends a request with an error response; `retry_seconds` (0: none) suggests when to try again."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_seconds: int = 0,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if retry_seconds:
            self.headers["retry-after"] = str(retry_seconds)
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    @property
    def json(self) -> str:
        """The body. It is ASCII: a message may quote a lone surrogate, which UTF-8 cannot encode."""
        type_ = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return json.dumps({"error": {"message": self.message, "type": type_, "param": self.param, "code": self.code}})

    def response(self) -> Response:
        return Response(self.json, self.status, self.headers, media_type="application/json")


class ClientGone(ApiError):
    """The client disconnected: nobody reads this response, but log and metrics count it."""

    def __init__(self):
        super().__init__(CLIENT_GONE, "the client disconnected")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told. The message of an unexpected exception is left out: it may quote other requests."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _validation_error(error.errors())
    if isinstance(error, HTTPException):
        message = _HTTP_MESSAGES.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers)
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, "internal server error; see the server's log")


def _validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """An error for a request that does not fit the schema, from pydantic's list of faults.

    A field with several alternatives yields a fault for each; the deepest belongs to the alternative that was meant.
    """
    error = max(errors, key=lambda error: len(error["loc"]))
    param, kind, context = _param(error["loc"][1:]), error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"the request is not valid JSON: {context.get('error', '')}")
    if kind == "none_required" or (kind == "too_long" and context["max_length"] == 0):
        message = f"{param} is not supported; leave it out"
    elif kind == "union_tag_invalid" and context["tag"] in ("tool", "function"):
        param = f"{param}.role"
        message = f"{param}: the model calls no functions of its clients; leave out messages with their results"
    elif kind == "union_tag_invalid":
        param = f"{param}.role"
        message = f"unknown {param}; use one of {context['expected_tags']}"
    elif kind == "literal_error" and "content" in error["loc"]:
        message = f"{param}: the model reads parts of the type {context['expected']} only; leave out others"
    elif kind == "value_error":
        message = f"{param}: {context['error']}"
    else:
        message = f"{param or 'the request'}: {error['msg']}"
    return ApiError(400, message, param=param or None)


def _param(path: Sequence[str | int]) -> str:
    """A location in a request: ("messages", 0, "user", "content", "list[TextPart]", 1) is "messages[0].content[1]".

    Pydantic puts the names of the alternatives it tried into the path; they are left out.
    """
    param, before = "", None
    for step in path:
        if isinstance(step, int):
            param += f"[{step}]"
        elif step.isidentifier() and step != "str" and not (step in ROLES and isinstance(before, int)):
            param += f".{step}" if param else step
        before = step
    return param
